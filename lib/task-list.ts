import type { FastifyBaseLogger, FastifyRequest } from 'fastify'
import { BackgroundTask, invalidTask, type TaskFunction, type TaskOwner } from './background-task.js'
import type { TaskRunMessage } from './diagnostics.js'
import type { Exchange } from './exchange.js'
import type { TaskOptions } from './options.js'
import type { Runner } from './runner.js'

/**
 * - `waiting`: its exchange has not ended
 * - `queued`: has work, and waits for a seat or for its turn
 * - `running`: one of its tasks runs
 * - `ended`: has no work; a late task takes it back to `queued`
 */
export type ListPhase = 'waiting' | 'queued' | 'running' | 'ended'

/** Places of tasks that were taken: so many are not worth a new array. */
const SHORT = 16

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
  #tasks: Array<BackgroundTask | undefined> = []
  #head = 0
  #cleanups: BackgroundTask[] | undefined
  #ended: (() => void) | undefined

  constructor (runner: Runner, request: FastifyRequest | undefined, phase: ListPhase) {
    this.runner = runner
    this.request = request
    this.phase = phase
  }

  get log (): FastifyBaseLogger {
    return this.request?.log ?? this.runner.log
  }

  get hasWork (): boolean {
    return this.unfinished > 0 || this.#cleanups !== undefined
  }

  add (fn: unknown, args: unknown[], options: TaskOptions | undefined): BackgroundTask {
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
    return [...running, ...queued.filter(task => task.state === 'pending')]
  }

  /** Takes all tasks that have not finished. Whoever awaits the running one leaves the list alone from now on. */
  takeAll (): BackgroundTask[] {
    const tasks = this.tasks()
    this.epoch++
    this.current = undefined
    this.#tasks = []
    this.#head = 0
    return tasks
  }

  /** When the task that has waited longest was added. */
  oldestAddedAt (): number | undefined {
    for (let i = this.#head; i < this.#tasks.length; i++) {
      const task = this.#tasks[i] as BackgroundTask
      if (task.state === 'pending') return task.addedAt
    }
    return undefined
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
