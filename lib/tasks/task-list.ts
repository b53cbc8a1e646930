import { AsyncLocalStorage } from 'node:async_hooks'
import type { FastifyBaseLogger, FastifyRequest } from 'fastify'
import { TaskDefinition, type AnyTaskDefinition } from '../definitions/define-task.js'
import { BackgroundTask, invalidTask, type TaskOwner } from './background-task.js'
import type { TaskRunMessage } from './diagnostics.js'
import type { Exchange } from '../exchange/exchange.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import { isGeneratorFunction, isInstance, isThenable, readOr } from '../foreign.js'
import { forFailure, toTask } from '../decorators/intake.js'
import type { JobOptions } from '../definitions/jobs.js'
import type { TaskOptions } from '../options.js'
import type { Runner } from '../runner/runner.js'
import { jobOf, type TaskJob } from '../definitions/defined-task.js'
import { Timer } from '../timers.js'
import { Queue } from '../queue.js'

/**
 * - `waiting`: its exchange has not ended
 * - `queued`: has work, and waits for a seat or for its turn
 * - `running`: one of its tasks runs
 * - `ended`: has nothing to run now; a late task, or one whose time has come, takes it back to `queued`
 */
export type ListPhase = 'waiting' | 'queued' | 'running' | 'ended'

/** Slots of tasks that were taken: so many are not worth a new array. */
const SHORT = 16
/** The list whose cleanup calls, after the drain: one that adds itself again would never end, and no deadline follows. */
export const insideCleanup = new AsyncLocalStorage<TaskList>()

/** No list has an array of its own for what few have. */
const NONE: never[] = []

/** Tasks that run in the order added, one at a time, and the cleanups behind them: what the runner runs. */
export class TaskList implements TaskOwner {
  readonly runner: Runner
  readonly request: FastifyRequest | undefined
  /** None for a task of the app. */
  exchange: Exchange | undefined
  phase: ListPhase
  /** Tasks that have not finished. */
  unfinished = 0
  /** The task or cleanup that runs. */
  current: BackgroundTask | undefined
  /** Whether that is a cleanup. */
  cleaning = false
  /** What is published of it when it has ended, if it is traced and waited for. */
  trace: TaskRunMessage | undefined
  /** The watch over what is waited for, if that has a limit. */
  limit: { clear: () => void } | undefined
  /** Whether a failure has stopped the list (`stopOnError`). */
  stopped = false
  /** Whether it has one of the seats that `concurrency` limits. */
  seated = false
  /** Rises when the list is abandoned, so that whoever awaited one of its tasks leaves it alone. */
  epoch = 0
  /** Its place among the lists that have work, or -1. */
  place = -1
  /** Tasks to be stored before the reply goes out; undefined once that was done: what comes then is stored at once. */
  toStore: BackgroundTask[] | undefined
  #tasks: Array<BackgroundTask | undefined> = []
  #head = 0
  /** Tasks that wait for their time. */
  #timers: Map<BackgroundTask, Timer> | undefined
  /** Tasks that wait for an engine to store them. */
  #unstored: Queue<BackgroundTask> | undefined
  /** Tasks of definitions that were abandoned before the reply: it must not promise them. */
  #broken: Array<TaskOptions['when']> | undefined
  #cleanups: BackgroundTask[] | undefined
  #ended: (() => void) | undefined
  /** Of a list that has no request, but one task: it may have had one. */
  #job: TaskJob | undefined

  constructor (runner: Runner, request: FastifyRequest | undefined, phase: ListPhase) {
    this.runner = runner
    this.request = request
    this.phase = phase
  }

  get log (): FastifyBaseLogger {
    return this.request?.log ?? this.#job?.log ?? this.runner.log
  }

  get hasWork (): boolean {
    return this.unfinished > 0 || this.#cleanups !== undefined
  }

  add (fn: unknown, args: unknown[], options: TaskOptions | undefined): BackgroundTask {
    // A function, the usual one, does not pay for the look at its prototypes.
    if (typeof fn !== 'function' && isInstance(fn, TaskDefinition)) return this.addJob(fn as AnyTaskDefinition, args[0], args[1] as JobOptions | undefined, options)
    const task = toTask(fn, args, this.runner.ledger.lastFunction)
    if (!this.runner.closed) this.runner.ledger.admit()
    task.join(this, this.exchange?.isHandlingFailure === true ? forFailure(options) : options)
    if (task === fn) task.recontext()
    if (this.runner.closed) {
      this.runner.ledger.refused(this, task)
    } else {
      this.#tasks.push(task)
      this.runner.added(this, task)
    }
    return task
  }

  /** A task of a definition. */
  addJob (definition: AnyTaskDefinition, payload: unknown, jobOptions: JobOptions | undefined, options: TaskOptions | undefined): BackgroundTask {
    const { runner } = this
    if (!runner.closed) runner.ledger.admit()
    const task = runner.jobs.make(definition, payload, jobOptions, this.exchange?.isHandlingFailure === true ? forFailure(options) : options, this.request)
    task.join(this, undefined)
    if (runner.closed) {
      this.#break(task)
      runner.ledger.refused(this, task)
    } else if (runner.dispatch === undefined) {
      runner.jobs.history.add(task)
      this.#tasks.push(task)
      runner.added(this, task)
    } else {
      this.#unstored ??= new Queue()
      this.#unstored.push(task)
      runner.added(this, task)
      runner.dispatch.added(this, task)
    }
    return task
  }

  /** A task of a definition that no request has added. */
  put (task: BackgroundTask): void {
    this.#job = jobOf(task)
    task.join(this, undefined)
    this.#tasks.push(task)
    if (this.#job.origin.delivery === undefined) this.runner.added(this, task)
    else this.runner.delivered(this, task)
  }

  /** The task starts later; the others do not wait for it. */
  later (task: BackgroundTask, ms: number): void {
    // A test does not wait for what it has recorded.
    if (this.runner.recorder?.has(task) === true) {
      jobOf(task).dueAt = 0
      this.comeBack(task)
      return
    }
    this.#timers ??= new Map()
    this.#timers.set(task, new Timer(() => { this.comeBack(task) }, ms))
  }

  /** A task that was away runs now, behind what is there. */
  comeBack (task: BackgroundTask): void {
    this.forget(task)
    this.#tasks.push(task)
    this.runner.wake(this)
  }

  /** A task that was away, if it was, is done. */
  forget (task: BackgroundTask): void {
    const timer = this.#timers?.get(task)
    if (timer !== undefined) {
      timer.clear()
      this.#timers?.delete(task)
      return
    }
    this.#unstored?.remove(task)
  }

  /** Whether tasks are away: the list has not ended. */
  get isWaitingForTasks (): boolean {
    return this.#isStoring || (this.#timers?.size ?? 0) > 0
  }

  /** `performance.now()` until when nothing happens here, if all that is left are tasks that wait for their time. */
  get restsUntil (): number | undefined {
    if (this.phase !== 'ended' || this.#isStoring || this.#timers === undefined) return undefined
    let first = Infinity
    // Only tasks of definitions wait for their time.
    for (const task of this.#timers.keys()) first = Math.min(first, jobOf(task).dueAt)
    return first
  }

  addCleanup (fn: unknown, args: unknown[]): void {
    if (typeof fn !== 'function' || isGeneratorFunction(fn)) throw invalidTask('addCleanup', fn)
    const cleanup = new BackgroundTask(fn as (...args: unknown[]) => unknown, ...args)
    cleanup.join(this, undefined)
    if (this.runner.closed && insideCleanup.getStore() === this) {
      this.runner.ledger.cleanupRefused(this, cleanup)
      return
    }
    this.#cleanups ??= []
    this.#cleanups.push(cleanup)
    this.runner.wake(this)
  }

  /** Takes the next task. */
  next (): BackgroundTask | undefined {
    while (this.#head < this.#tasks.length) {
      const task = this.#tasks[this.#head] as BackgroundTask
      this.#tasks[this.#head++] = undefined
      // Half of it at a time, so that a list that is never empty does not grow.
      if (this.#head > SHORT && 2 * this.#head >= this.#tasks.length) {
        this.#tasks = this.#tasks.slice(this.#head)
        this.#head = 0
      }
      if (task.state === 'pending') return task
    }
    return undefined
  }

  /** Takes all cleanups, the one added last first. */
  takeCleanups (): BackgroundTask[] {
    const cleanups = this.#cleanups?.reverse() ?? []
    this.#cleanups = undefined
    return cleanups
  }

  /** Takes the cleanup added last. */
  nextCleanup (): BackgroundTask | undefined {
    const cleanup = this.#cleanups?.pop()
    if (this.#cleanups?.length === 0) this.#cleanups = undefined
    return cleanup
  }

  /** The tasks that have not finished, the running one first. */
  tasks (): BackgroundTask[] {
    const running = this.current !== undefined && !this.cleaning ? [this.current] : []
    return [...running, ...this.#pending()]
  }

  /** Takes all tasks that have not finished. Whoever awaits the running one leaves the list alone from now on. */
  takeAll (): BackgroundTask[] {
    const tasks = this.tasks()
    if (this.phase === 'waiting') for (const task of tasks) if (task.options?.job !== undefined) this.#break(task)
    this.epoch++
    this.current = undefined
    this.limit?.clear()
    this.limit = undefined
    this.#tasks = []
    this.#head = 0
    this.toStore = undefined
    this.#unstored = undefined
    for (const timer of this.#timers?.values() ?? []) timer.clear()
    this.#timers = undefined
    return tasks
  }

  /** When the task that has waited longest was added. */
  oldestAddedAt (): number | undefined {
    let oldest: number | undefined
    const look = (task: BackgroundTask | undefined): boolean => {
      if (task?.state !== 'pending') return false
      oldest = Math.min(oldest ?? Infinity, task.addedAt)
      return true
    }
    // Of those that come back some are older than what stands in front of them.
    for (const task of this.#timers?.keys() ?? NONE) look(task)
    for (const task of this.#unstored ?? NONE) if (look(task)) break
    for (let i = this.#head; i < this.#tasks.length; i++) if (look(this.#tasks[i])) break
    return oldest
  }

  /** Whether the reply promises something that is to be stored, or cannot be any more. */
  get hasPromises (): boolean {
    return (this.toStore?.length ?? 0) > 0 || this.#broken !== undefined
  }

  /** Whether the reply would promise a task that was abandoned. */
  takeBroken (outcome: ExchangeOutcome): boolean {
    const broken = this.#broken ?? NONE
    this.#broken = undefined
    return !outcome.failed && broken.some(when => when !== 'error' && (typeof when !== 'function' || readOr(true, () => {
      const answer: unknown = when(outcome)
      return isThenable(answer) || Boolean(answer)
    })))
  }

  get #isStoring (): boolean {
    return (this.#unstored?.length ?? 0) > 0
  }

  #break (task: BackgroundTask): void {
    (this.#broken ??= []).push(task.options?.when ?? this.runner.options.when)
  }

  * #pending (): Iterable<BackgroundTask> {
    // After the head no slot is empty.
    for (const tasks of [this.#tasks.slice(this.#head) as BackgroundTask[], this.#unstored ?? NONE, this.#timers?.keys() ?? NONE]) {
      for (const task of tasks) if (task.state === 'pending') yield task
    }
  }

  taskCancelled (task: BackgroundTask): void {
    this.runner.cancelled(this, task)
  }

  /** Settles when the list has ended, from now. */
  whenEnded (): Promise<void> | undefined {
    if (this.#ended !== undefined) return undefined
    return new Promise(resolve => { this.#ended = resolve })
  }

  /** The list has no work left. */
  end (): void {
    this.#ended?.()
    this.#ended = undefined
  }
}
