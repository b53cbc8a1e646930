import { setMaxListeners } from 'node:events'
import type { FastifyBaseLogger } from 'fastify'
import { asDefined, type DefinedTask } from '../definitions/defined-task.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import { attempt } from '../foreign.js'
import type { BackgroundTask } from '../tasks/background-task.js'
import type { ListOwner, TaskList } from '../tasks/task-list.js'
import type { TaskCondition } from '../tasks/task-options.js'
import { Conditions } from './conditions.js'
import type { Gate } from './gate.js'
import { Ledger, type TaskStats } from './ledger.js'
import { OpenLists } from './open-lists.js'
import type { RunnerOptions } from './runner-options.js'
import { TaskRuns } from './task-runs.js'
import { Turns } from './turns.js'
import { Watchers } from './watchers.js'

/** A task that the deadline of the drain has cut off, and its list. */
export interface CutOff {
  readonly list: TaskList
  readonly task: BackgroundTask
}

/** Runs the tasks of each list one by one, and knows which lists have work. */
export class Runner implements ListOwner {
  readonly log: FastifyBaseLogger
  readonly ledger: Ledger
  /** The lists that have work. */
  readonly open = new OpenLists()
  gate: Gate | undefined
  readonly #conditions: Conditions
  readonly #runs: TaskRuns
  readonly #turns: Turns
  #isClosed = false
  readonly #listsDone = new Watchers()
  #controller: AbortController | undefined

  constructor (options: RunnerOptions, log: FastifyBaseLogger) {
    this.log = log
    this.ledger = new Ledger(options.maxPending)
    this.#conditions = new Conditions(options.when)
    this.#runs = new TaskRuns(options, this.ledger, this.#conditions, (list, task, ms) => { this.#delay(list, task, ms) })
    this.#turns = new Turns(options.concurrency, list => { this.#takeTurn(list) })
  }

  /** Whether the drain is over. A task that is added now is abandoned. */
  get isClosed (): boolean {
    return this.#isClosed
  }

  /** Aborts at the deadline of the drain. */
  get signal (): AbortSignal {
    if (this.#controller === undefined) {
      this.#controller = new AbortController()
      // All lists share this signal, and Node 20 warns of the eleventh listener.
      setMaxListeners(0, this.#controller.signal)
    }
    return this.#controller.signal
  }

  get stats (): TaskStats {
    return this.ledger.stats(this.open)
  }

  /** The condition under which the task runs. */
  conditionOf (task: BackgroundTask): TaskCondition {
    return this.#conditions.of(task)
  }

  /** A task was put on the list. */
  taskAdded (list: TaskList, task: BackgroundTask): void {
    this.ledger.added(list, task)
    this.resume(list)
  }

  /** A task that an engine has delivered was put on the list. The task has waited in the engine already. */
  taskDelivered (list: TaskList, task: BackgroundTask): void {
    this.ledger.added(list, task)
    this.open.add(list)
    this.#turns.start(list)
  }

  taskCancelled (list: TaskList, task: BackgroundTask): void {
    this.ledger.skipped(list, task, 'it was cancelled')
    this.#taskLeft(list, task)
  }

  /** Skips the task that runs. The list goes on with its next task. */
  taskCutOff (list: TaskList, task: BackgroundTask, reason: unknown): void {
    list.letRunningGo()
    this.#runs.cutOff(list, reason)
    task.abort(reason)
    this.ledger.skipped(list, task, 'it was cancelled')
    this.#turns.queue(list)
  }

  /** An engine has stored the task. */
  taskStored (list: TaskList, task: BackgroundTask): void {
    this.ledger.enqueued(list, task)
    this.#taskLeft(list, task)
  }

  /** No engine has stored the task. */
  taskNotStored (list: TaskList, task: BackgroundTask, error: unknown): void {
    this.#runs.notStored(list, task, error)
    this.#taskLeft(list, task)
  }

  /** Skips the task unless its `when` wants it for this outcome. @returns whether it is wanted */
  skipUnlessWanted (list: TaskList, task: BackgroundTask, outcome: ExchangeOutcome | undefined): boolean {
    if (this.#runs.skipUnlessWanted(list, task, outcome)) return true
    this.#taskLeft(list, task)
    return false
  }

  /** The list has something to run. */
  resume (list: TaskList): void {
    this.open.add(list)
    if (list.phase === 'idle') this.#queue(list)
  }

  exchangeEnded (list: TaskList): void {
    if (list.hasWork) this.#queue(list)
    else this.#finish(list)
  }

  /** Resolves when no list has work. */
  async idle (): Promise<void> {
    while (this.open.size > 0) await new Promise<void>(resolve => { this.onListDone(resolve) })
  }

  /** Calls back once, when a list has no work any more, or only tasks that wait for their time. */
  onListDone (notify: () => void): void {
    this.#listsDone.add(notify)
  }

  /** The drain is over. */
  close (): void {
    this.#isClosed = true
    this.#runs.close()
  }

  /**
   * Cuts off all tasks that are left, aborts their signals, and starts the cleanups. A task of this process is `abandoned` then. A task
   * that an engine has delivered is returned to the engine, and is `enqueued`.
   */
  abandonAll (): CutOff[] {
    this.close()
    const { reason } = AbortSignal.abort()
    const lists = [...this.open]
    const cutOff = lists.flatMap(list => this.#cutOff(list, reason).map(task => ({ list, task })))
    const cleanups = lists.map(list => ({ list, cleanups: list.takeCleanups() }))
    for (const list of lists) {
      if (list.phase === 'waiting') this.#leave(list)
      else this.#finish(list)
    }
    // Everything is noted by now. Listeners and cleanups may do what they want, and find no task left to cancel.
    void this.signal
    this.#controller?.abort(reason)
    for (const { task } of cutOff) task.abort(reason)
    for (const { list, cleanups: left } of cleanups) for (const cleanup of left) this.#runs.startCleanup(list, cleanup)
    return cutOff
  }

  #cutOff (list: TaskList, reason: unknown): BackgroundTask[] {
    const left = list.takeAll()
    this.#runs.cutOff(list, reason)
    for (const task of left) {
      const defined = asDefined(task)
      if (defined?.envelope.delivery === undefined) {
        this.ledger.abandoned(list, task)
      } else {
        this.ledger.returned(list, task)
        defined.settle({ kind: 'released' })
      }
    }
    return left
  }

  #delay (list: TaskList, task: DefinedTask, ms: number): void {
    if (this.gate?.skipsDelays(task) === true) {
      task.dueAt = 0
      list.comeBack(task)
    } else {
      list.delay(task, ms)
    }
  }

  #queue (list: TaskList): void {
    if (this.gate?.keep(list) === true) {
      list.becomeIdle()
      this.#leave(list)
    } else {
      this.#turns.queue(list)
    }
  }

  #takeTurn (list: TaskList): void {
    list.becomeRunning()
    const wait = this.#advance(list)
    if (wait !== undefined) void this.#follow(list, wait)
  }

  /**
   * Runs tasks until one has to be waited for, the list has ended, or the turn is over.
   * @returns what has to be waited for
   */
  #advance (list: TaskList): Promise<unknown> | undefined {
    for (;;) {
      const task = list.next()
      try {
        const wait = task === undefined ? this.#cleanUp(list) : this.#runs.run(list, task)
        if (wait !== undefined || list.phase === 'idle') return wait
      } catch (fault) {
        this.#fault(list, fault)
      }
      if (list.hasWork && this.#turns.turnIsOver()) {
        this.#turns.queue(list)
        return undefined
      }
    }
  }

  /** Runs a cleanup, or ends the list. */
  #cleanUp (list: TaskList): Promise<unknown> | undefined {
    if (list.isWaitingForTasks) {
      list.becomeIdle()
      this.ledger.lastFunction.forget()
      this.#turns.releaseSeat(list)
      // This wakes the drain, which does not wait for tasks whose time comes after its deadline.
      this.#listsDone.notify()
      return undefined
    }
    const cleanup = list.nextCleanup()
    if (cleanup !== undefined) return this.#runs.runCleanup(list, cleanup)
    this.#finish(list)
    return undefined
  }

  /** Goes on with a list after a promise: that of a task, or that of an `onError`. */
  async #follow (list: TaskList, first: Promise<unknown>): Promise<void> {
    const { epoch } = list
    let wait: Promise<unknown> | undefined = first
    while (wait !== undefined) {
      const task = list.current
      let hasSettled = false
      try {
        const result = await wait
        hasSettled = true
        if (list.epoch !== epoch) return this.#runs.late(list, task)
        wait = undefined
        if (task !== undefined) this.#runs.succeeded(list, task, result)
      } catch (error) {
        if (list.epoch !== epoch) return this.#runs.late(list, task)
        if (hasSettled) this.#fault(list, error)
        // The promise of an `onError` never rejects.
        else wait = this.#failed(list, task as BackgroundTask, error)
      }
      if (wait !== undefined) continue
      if (list.hasWork && this.#turns.turnIsOver()) return this.#turns.queue(list)
      wait = this.#advance(list)
    }
  }

  #failed (list: TaskList, task: BackgroundTask, error: unknown): Promise<unknown> | undefined {
    try {
      return this.#runs.failed(list, task, error)
    } catch (fault) {
      this.#fault(list, fault)
      return undefined
    }
  }

  /** Logs a fault of this package that happened while the end of a task was noted. The fault must not cost any other task or list. */
  #fault (list: TaskList, err: unknown): void {
    list.doneWithTask()
    attempt(() => { list.log.error({ err }, 'the end of a background task could not be noted') })
  }

  /** A task has left a list without having run there. */
  #taskLeft (list: TaskList, task: BackgroundTask): void {
    list.forget(task)
    if (list.phase === 'waiting' && !list.hasWork) this.#leave(list)
    // The task may have been the last one that the cleanups waited for.
    else if (list.phase === 'idle' && list.index !== -1) this.#turns.queue(list)
  }

  #finish (list: TaskList): void {
    list.becomeIdle()
    this.#turns.releaseSeat(list)
    this.#leave(list)
    list.end()
  }

  #leave (list: TaskList): void {
    this.open.delete(list)
    this.ledger.lastFunction.forget()
    this.#listsDone.notify()
  }
}
