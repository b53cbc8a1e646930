import { setMaxListeners } from 'node:events'
import type { FastifyBaseLogger } from 'fastify'
import type { BackgroundTask } from '../tasks/background-task.js'
import { Ledger, type TaskStats } from './ledger.js'
import { attempt, promiseOf } from '../foreign.js'
import { OpenLists } from './open-lists.js'
import type { Jobs } from '../definitions/jobs.js'
import type { ResolvedOptions } from '../options.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import type { Dispatch } from '../dispatch/dispatch.js'
import type { EngineLink } from '../dispatch/engine-link.js'
import type { Recorder } from '../decorators/recorder.js'
import type { TaskList } from '../tasks/task-list.js'
import { TaskRuns } from './task-runs.js'
import { Turns } from './turns.js'

/** The executor of an app's tasks: runs the tasks of each list one by one, and knows which lists have work. */
export class Runner {
  readonly log: FastifyBaseLogger
  readonly options: ResolvedOptions
  readonly ledger: Ledger
  readonly jobs: Jobs
  /** The way to the engine, if there is one. */
  link: EngineLink | undefined
  /** None when everything runs here. */
  dispatch: Dispatch | undefined
  /** Keeps what a test has added from running. */
  recorder: Recorder | undefined
  /** The lists that have work. */
  readonly open = new OpenLists()
  /** Whether the drain is over: what is added now is abandoned. */
  closed = false
  readonly #runs: TaskRuns
  readonly #turns: Turns
  #watchers: Array<() => void> = []
  #controller: AbortController | undefined

  constructor (options: ResolvedOptions, log: FastifyBaseLogger, jobs: Jobs) {
    this.log = log
    this.jobs = jobs
    this.options = options
    this.ledger = new Ledger(options.maxPending)
    this.#runs = new TaskRuns(options, this.ledger)
    this.#turns = new Turns(options.concurrency, list => { this.#takeTurn(list) })
  }

  /** Aborts at the deadline of the drain. */
  get signal (): AbortSignal {
    if (this.#controller === undefined) {
      this.#controller = new AbortController()
      // All lists share it: Node 20 warns of the eleventh listener.
      setMaxListeners(0, this.#controller.signal)
    }
    return this.#controller.signal
  }

  get stats (): TaskStats {
    return this.ledger.stats(this.open)
  }

  added (list: TaskList, task: BackgroundTask): void {
    this.ledger.added(list, task)
    this.recorder?.taskAdded(list, task)
    this.wake(list)
    if (this.options.waitUntil !== undefined && list.request !== undefined) this.#waitUntil(list, this.options.waitUntil)
  }

  /** A task that an engine has delivered has waited before. */
  delivered (list: TaskList, task: BackgroundTask): void {
    this.ledger.added(list, task)
    this.open.add(list)
    this.#turns.start(list)
  }

  cancelled (list: TaskList, task: BackgroundTask): void {
    this.ledger.skipped(list, task, 'it was cancelled')
    this.#gone(list, task)
  }

  /** An engine has stored the task. */
  enqueued (list: TaskList, task: BackgroundTask): void {
    this.ledger.enqueued(list, task)
    this.#gone(list, task)
  }

  /** No engine has stored the task. */
  notStored (list: TaskList, task: BackgroundTask, error: unknown): void {
    this.#runs.notStored(list, task, error)
    this.#gone(list, task)
  }

  /** Whether the task's `when` holds for this outcome; if not, it is skipped. */
  holds (list: TaskList, task: BackgroundTask, outcome: ExchangeOutcome | undefined): boolean {
    if (this.#runs.isWanted(list, task, outcome)) return true
    this.#gone(list, task)
    return false
  }

  /** The list has work. */
  wake (list: TaskList): void {
    this.open.add(list)
    if (list.phase === 'ended') this.#queue(list)
  }

  exchangeEnded (list: TaskList): void {
    this.storeNow(list, list.exchange?.outcome)
    if (list.hasWork) this.#queue(list)
    else this.#finish(list)
  }

  /** No reply will pass `onSend`, or has: what the list has for the engine is stored now. */
  storeNow (list: TaskList, outcome: ExchangeOutcome | undefined): void {
    // Failures are logged with their tasks.
    this.dispatch?.flush(list, outcome)?.catch(() => {})
  }

  /** Resolves when no list has work. */
  async idle (): Promise<void> {
    while (this.open.size > 0) await new Promise<void>(resolve => { this.onLeave(resolve) })
  }

  /** Calls back once, when a list has no work any more, or rests. */
  onLeave (notify: () => void): void {
    this.#watchers.push(notify)
  }

  /**
   * Cuts off what is left of all lists, and tells their signals and cleanups. It is `abandoned` then, or `enqueued`: what an
   * engine had delivered goes back there.
   */
  abandonAll (): Array<{ list: TaskList, task: BackgroundTask }> {
    this.closed = true
    const { reason } = AbortSignal.abort()
    const lists = [...this.open]
    const cutOff = lists.flatMap(list => this.#cutOff(list, reason).map(task => ({ list, task })))
    const cleanups = lists.map(list => ({ list, cleanups: list.takeCleanups() }))
    for (const list of lists) {
      if (list.phase === 'waiting') this.#leave(list)
      else this.#finish(list)
    }
    // All is booked: listeners and cleanups may do what they want, and find nothing left to be cancelled.
    void this.signal
    this.#controller?.abort(reason)
    for (const { task } of cutOff) task.abort(reason)
    // Started, and not waited for.
    for (const { list, cleanups: left } of cleanups) for (const cleanup of left) this.#runs.cleanUp(list, cleanup)
    return cutOff
  }

  #cutOff (list: TaskList, reason: unknown): BackgroundTask[] {
    const left = list.takeAll()
    this.#runs.cutOff(list, reason)
    for (const task of left) {
      const job = task.options?.job
      if (job?.origin.delivery === undefined) {
        this.ledger.abandoned(list, task)
      } else {
        this.ledger.released(list, task)
        job.settle({ kind: 'released' })
      }
    }
    return left
  }

  #queue (list: TaskList): void {
    if (this.recorder?.keep(list) === true) {
      list.phase = 'ended'
      this.#leave(list)
    } else {
      this.#turns.queue(list)
    }
  }

  #takeTurn (list: TaskList): void {
    list.phase = 'running'
    const wait = this.#advance(list)
    if (wait !== undefined) void this.#follow(list, wait)
  }

  /** Runs tasks until one has to be waited for, which it returns, or the list has ended, or the turn is up. */
  #advance (list: TaskList): Promise<unknown> | undefined {
    for (;;) {
      const task = list.next()
      try {
        const wait = task === undefined ? this.#cleanUp(list) : this.#runs.run(list, task)
        if (wait !== undefined || list.phase === 'ended') return wait
      } catch (fault) {
        this.#fault(list, fault)
      }
      if (list.hasWork && this.#turns.isUp()) {
        this.#turns.queue(list)
        return undefined
      }
    }
  }

  /** Runs a cleanup, or ends the list. */
  #cleanUp (list: TaskList): Promise<unknown> | undefined {
    if (list.isWaitingForTasks) {
      list.phase = 'ended'
      this.ledger.lastFunction.forget()
      this.#turns.leave(list)
      // The drain does not wait for what comes after its deadline.
      this.#notify()
      return undefined
    }
    const cleanup = list.nextCleanup()
    if (cleanup !== undefined) return this.#runs.run(list, cleanup, true)
    this.#finish(list)
    return undefined
  }

  /** Goes on behind a promise: a task's, or that of an `onError`. */
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
      if (list.hasWork && this.#turns.isUp()) return this.#turns.queue(list)
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

  /** A fault in the booking of a task costs no other one, and no other list. */
  #fault (list: TaskList, err: unknown): void {
    list.current = undefined
    attempt(() => { list.log.error({ err }, 'the end of a background task could not be noted') })
  }

  /** A task has left a list without having run there. */
  #gone (list: TaskList, task: BackgroundTask): void {
    list.forget(task)
    if (list.phase === 'waiting' && !list.hasWork) this.#leave(list)
    // It may have been the last one that the cleanups waited for.
    else if (list.phase === 'ended' && list.place !== -1) this.#turns.queue(list)
  }

  #finish (list: TaskList): void {
    list.phase = 'ended'
    this.ledger.lastFunction.forget()
    this.#turns.leave(list)
    this.#leave(list)
    list.end()
  }

  #leave (list: TaskList): void {
    this.open.delete(list)
    this.#notify()
  }

  #notify (): void {
    if (this.#watchers.length === 0) return
    const watchers = this.#watchers
    this.#watchers = []
    for (const notify of watchers) notify()
  }

  #waitUntil (list: TaskList, waitUntil: (promise: Promise<void>) => void): void {
    const ended = list.whenEnded()
    if (ended === undefined) return
    const failed = (err: unknown): void => {
      attempt(() => { list.log.error({ err }, 'waitUntil failed: the platform may not wait for the background tasks') })
    }
    try {
      // An async function fits its type.
      promiseOf(waitUntil(ended))?.catch(failed)
    } catch (error) {
      failed(error)
    }
  }
}
