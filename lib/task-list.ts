import type { FastifyBaseLogger, FastifyRequest } from 'fastify'
import { TaskDefinition, type AnyTaskDefinition } from './define-task.js'
import { BackgroundTask, invalidTask, type TaskFunction, type TaskOwner } from './background-task.js'
import type { TaskRunMessage } from './diagnostics.js'
import type { Exchange } from './exchange.js'
import type { JobOptions } from './jobs.js'
import type { TaskOptions } from './options.js'
import type { Runner } from './runner.js'
import { jobOf, type TaskJob } from './task-job.js'

/**
 * - `waiting`: its exchange has not ended
 * - `queued`: has work, and waits for a seat or for its turn
 * - `running`: one of its tasks runs
 * - `ended`: has nothing to run now; a late task, or one whose time has come, takes it back to `queued`
 */
export type ListPhase = 'waiting' | 'queued' | 'running' | 'ended'

/** Places of tasks that were taken: so many are not worth a new array. */
const SHORT = 16

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
  #timers: Map<BackgroundTask, NodeJS.Timeout> | undefined
  /** Tasks that wait for an engine to store them. */
  #unstored: BackgroundTask[] = NONE
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
    if (typeof fn !== 'function' && fn instanceof TaskDefinition) return this.addJob(fn as AnyTaskDefinition, args[0], args[1] as JobOptions | undefined, options)
    const task = toTask('addTask', fn, args)
    if (!this.runner.closed) this.runner.ledger.admit()
    task.join(this, options)
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
    const task = runner.jobs.make(definition, payload, jobOptions, options, this.request)
    task.join(this, undefined)
    if (runner.closed) {
      runner.ledger.refused(this, task)
    } else if (runner.dispatch === undefined) {
      runner.jobs.history.add(task)
      this.#tasks.push(task)
      runner.added(this, task)
    } else {
      if (this.#unstored === NONE) this.#unstored = [task]
      else this.#unstored.push(task)
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
    this.#timers.set(task, setTimeout(() => { this.comeBack(task) }, ms))
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
      clearTimeout(timer)
      this.#timers?.delete(task)
      return
    }
    const place = this.#unstored.indexOf(task)
    if (place !== -1) this.#unstored.splice(place, 1)
  }

  /** Whether tasks are away: the list has not ended. */
  get isWaitingForTasks (): boolean {
    return this.#unstored.length > 0 || (this.#timers !== undefined && this.#timers.size > 0)
  }

  /** `Date.now()` until when nothing happens here, if all that is left are tasks that wait for their time. */
  get restsUntil (): number | undefined {
    if (this.phase !== 'ended' || this.#unstored.length > 0 || this.#timers === undefined) return undefined
    // Only tasks of definitions wait for their time.
    return Math.min(...Array.from(this.#timers.keys(), task => jobOf(task).dueAt))
  }

  addCleanup (fn: unknown, args: unknown[]): void {
    if (typeof fn !== 'function') throw invalidTask('addCleanup', fn)
    const cleanup = new BackgroundTask(fn as (...args: unknown[]) => unknown, ...args)
    cleanup.join(this, undefined)
    this.#cleanups ??= []
    this.#cleanups.push(cleanup)
    this.runner.wake(this)
  }

  /** Takes the next task. */
  next (): BackgroundTask | undefined {
    while (this.#head < this.#tasks.length) {
      const task = this.#tasks[this.#head] as BackgroundTask
      this.#tasks[this.#head++] = undefined
      if (task.state === 'pending') return task
    }
    if (this.#head > SHORT) {
      this.#tasks = []
      this.#head = 0
    }
    return undefined
  }

  /** Takes the cleanup added last. */
  nextCleanup (): BackgroundTask | undefined {
    const cleanup = this.#cleanups?.pop()
    if (this.#cleanups?.length === 0) this.#cleanups = undefined
    return cleanup
  }

  /** The tasks that have not finished, the running one first. */
  tasks (): BackgroundTask[] {
    // Behind the head no place is empty.
    const queued = this.#tasks.slice(this.#head) as BackgroundTask[]
    const running = this.current !== undefined && !this.cleaning ? [this.current] : []
    return [...running, ...[...queued, ...this.#unstored, ...this.#timers?.keys() ?? []].filter(task => task.state === 'pending')]
  }

  /** Takes all tasks that have not finished. Whoever awaits the running one leaves the list alone from now on. */
  takeAll (): BackgroundTask[] {
    const tasks = this.tasks()
    this.epoch++
    this.current = undefined
    this.#tasks = []
    this.#head = 0
    this.toStore = undefined
    this.#unstored = NONE
    for (const timer of this.#timers?.values() ?? []) clearTimeout(timer)
    this.#timers = undefined
    return tasks
  }

  /** When the task that has waited longest was added. */
  oldestAddedAt (): number | undefined {
    for (let i = this.#head; i < this.#tasks.length; i++) {
      const task = this.#tasks[i] as BackgroundTask
      if (task.state === 'pending') return task.addedAt
    }
    const away = [...this.#unstored, ...this.#timers?.keys() ?? NONE]
    return away[0]?.addedAt
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

function toTask (where: string, fn: unknown, args: unknown[]): BackgroundTask {
  if (typeof fn === 'function') return BackgroundTask.of(fn as TaskFunction, args)
  if (fn instanceof BackgroundTask && args.length === 0) return fn
  throw invalidTask(where, fn, true)
}
