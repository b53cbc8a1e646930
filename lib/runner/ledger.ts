import type { AsyncResource } from 'node:async_hooks'
import type { FastifyBaseLogger } from 'fastify'
import type { BackgroundTask } from '../tasks/background-task.js'
import { LastFunction } from '../tasks/last-function.js'
import { abandonedChannel, addedChannel, enqueuedChannel, failedChannel, publish, skippedChannel, type TaskAddedMessage } from '../tasks/diagnostics.js'
import { overloaded } from '../errors.js'
import { attempt } from '../foreign.js'
import type { TaskList } from '../tasks/task-list.js'
import { TurnClock } from './turn-clock.js'
import { Failures } from './failures.js'

/** Tasks by their state, counted since the plugin was registered. Cleanups do not count. */
export interface TaskStats {
  /** Now. */
  readonly pending: number
  /** Now. */
  readonly running: number
  readonly succeeded: number
  readonly failed: number
  readonly skipped: number
  readonly abandoned: number
  /** Tasks that this process has stored in the engine. What becomes of them there is not counted. */
  readonly enqueued: number
  /** Milliseconds since the pending task that has waited longest was added. 0 when nothing is pending. */
  readonly oldestPendingMs: number
}

/** Carries out each change of a task's state, with its count and its message on a channel. */
export class Ledger {
  readonly #counts = { pending: 0, running: 0, succeeded: 0, failed: 0, skipped: 0, abandoned: 0, enqueued: 0 }
  readonly #maxPending: number
  /** The tasks that an engine has delivered and that have not finished. They wait in the engine, so `maxPending` does not count them. */
  #deliveries = 0
  readonly #clock = new TurnClock()
  readonly lastFunction = new LastFunction()
  /** The failures for `idle({ rejectOnFailure: true })`. */
  readonly failures = new Failures()

  constructor (maxPending: number) {
    this.#maxPending = maxPending
  }

  /** The number of tasks that have not finished. */
  get unfinished (): number {
    return this.#counts.pending + this.#counts.running
  }

  stats (lists: Iterable<TaskList>): TaskStats {
    let oldest = Infinity
    for (const list of lists) oldest = Math.min(oldest, list.oldestAddedAt() ?? Infinity)
    return { ...this.#counts, oldestPendingMs: oldest === Infinity ? 0 : performance.now() - oldest }
  }

  /** @throws FST_BGT_OVERLOADED */
  admit (): void {
    const unfinished = this.unfinished - this.#deliveries
    if (unfinished >= this.#maxPending) throw overloaded(unfinished, this.#maxPending)
  }

  added (list: TaskList, task: BackgroundTask): void {
    // Most lists have one task, and no use for the clock of the turn.
    task.addedAt = list.unfinished === 0 ? performance.now() : this.#clock.now()
    list.taskAdded()
    this.#counts.pending++
    if (list.isDelivery) this.#deliveries++
    if (addedChannel.hasSubscribers) publish(addedChannel, messageOf(list, task))
  }

  started (task: BackgroundTask): void {
    this.#counts.pending--
    this.#counts.running++
    task.begin()
  }

  succeeded (list: TaskList, task: BackgroundTask): void {
    this.#taskEnded(list)
    this.#counts.running--
    this.#counts.succeeded++
    task.end('succeeded', this.lastFunction)
  }

  /** @returns the task's context, in which its failure is to be reported */
  failed (list: TaskList, task: BackgroundTask, error: unknown): AsyncResource {
    this.#taskEnded(list)
    // A task whose `when` threw has not started.
    this.#counts[task.state === 'running' ? 'running' : 'pending']--
    this.#counts.failed++
    this.failures.add(task, error)
    const context = task.end('failed')
    if (failedChannel.hasSubscribers) publish(failedChannel, { ...messageOf(list, task), error })
    return context
  }

  /** An attempt has failed, and there will be another one. */
  retried (task: BackgroundTask): void {
    this.#counts.running--
    this.#counts.pending++
    task.resetForRetry()
  }

  /** An engine has stored the task, and this process does not have it any longer. */
  enqueued (list: TaskList, task: BackgroundTask): void {
    this.#taskEnded(list)
    this.#counts.pending--
    this.#counts.enqueued++
    task.end('enqueued')
    if (enqueuedChannel.hasSubscribers) publish(enqueuedChannel, messageOf(list, task))
  }

  /** A job that is on no list was stored. */
  enqueuedAlone (task: BackgroundTask): void {
    this.#counts.enqueued++
    task.end('enqueued')
    if (enqueuedChannel.hasSubscribers) publish(enqueuedChannel, { task })
  }

  /** A task that an engine has delivered is returned to it. */
  returned (list: TaskList, task: BackgroundTask): void {
    this.#taskEnded(list)
    this.#counts[task.state === 'running' ? 'running' : 'pending']--
    task.end('enqueued')
  }

  skipped (list: TaskList, task: BackgroundTask, reason: string): void {
    this.#taskEnded(list)
    this.#counts[task.state === 'running' ? 'running' : 'pending']--
    this.#counts.skipped++
    // A task that was cancelled before its start has ended already.
    if (task.state !== 'skipped') task.end('skipped')
    if (skippedChannel.hasSubscribers) publish(skippedChannel, { ...messageOf(list, task), reason })
    attempt(() => {
      if (isDebug(list.log)) list.log.debug({ task: task.toBindings(), reason }, `background task skipped: ${reason}`)
    })
  }

  abandoned (list: TaskList, task: BackgroundTask): void {
    this.#taskEnded(list)
    this.#counts[task.state === 'running' ? 'running' : 'pending']--
    this.#counts.abandoned++
    task.end('abandoned')
    if (!abandonedChannel.hasSubscribers) return
    publish(abandonedChannel, { ...messageOf(list, task), ageMs: performance.now() - task.addedAt })
  }

  #taskEnded (list: TaskList): void {
    list.taskEnded()
    if (list.isDelivery) this.#deliveries--
  }

  /** A task was added after the drain. */
  refused (list: TaskList, task: BackgroundTask): void {
    this.added(list, task)
    this.abandoned(list, task)
    task.abort()
    attempt(() => {
      list.log.error({ task: task.toBindings() }, 'background task abandoned: it was added after the app had closed')
    })
  }

  /** A cleanup has added another one after the drain. */
  cleanupRefused (list: TaskList, cleanup: BackgroundTask): void {
    cleanup.end('abandoned')
    attempt(() => {
      list.log.error({ task: cleanup.toBindings() }, 'cleanup of background tasks abandoned: a cleanup added it after the app had closed')
    })
  }
}

export function messageOf (list: TaskList, task: BackgroundTask): TaskAddedMessage {
  return list.request === undefined ? { task } : { task, request: list.request }
}

// Pino tells whether it logs at this level. Other loggers may not tell, so they get the line.
function isDebug (log: FastifyBaseLogger & { isLevelEnabled?: (level: string) => boolean }): boolean {
  return log.isLevelEnabled?.('debug') ?? true
}
