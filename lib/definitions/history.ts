import { AsyncResource } from 'node:async_hooks'
import type { DefinedTask, TaskHistory } from './defined-task.js'

/** Ended tasks of definitions that are remembered. For a while there may be twice as many. */
const MAX_ENDED = 1_000

/** The most milliseconds that a timer of Node takes. The next look is no later. */
const MAX_WAIT_MS = 2 ** 31 - 1

/** The least milliseconds between two looks, because many records may expire one by one. */
const MIN_SWEEP_MS = 1_000

/**
 * The tasks of definitions that this process runs, or has run. An ended task is remembered until its `keep` has passed, and only while it
 * is one of the last thousand.
 */
export class History implements TaskHistory {
  readonly #tasks = new Map<string, DefinedTask>()
  #ended: DefinedTask[] = []
  #timer: NodeJS.Timeout | undefined
  // The timer does not keep the `AsyncLocalStorage` stores of the request whose task has ended.
  readonly #context = new AsyncResource('BackgroundTasksHistory')
  #nextSweep = Infinity

  find (id: string): DefinedTask | undefined {
    const task = this.#tasks.get(id)
    if (task === undefined || !isExpired(task)) return task
    this.#tasks.delete(id)
    return undefined
  }

  /**
   * Remembers a task that was added. If a task with the same key is there already, that one stays. The first of them to start decides which
   * one runs.
   */
  add (task: DefinedTask): void {
    if (!this.isTaken(task)) this.#tasks.set(task.id, task)
  }

  /** Whether another task of the same key is pending, runs, or has run. */
  isTaken (task: DefinedTask): boolean {
    const other = this.find(task.id)
    return other !== undefined && other !== task && other.state !== 'skipped' && other.state !== 'abandoned'
  }

  /** Lets a task that is about to start claim its key. False if another task of this key has started. */
  claim (task: DefinedTask): boolean {
    const other = this.find(task.id)
    if (other !== undefined && this.isTaken(task) && other.attempt > 0) return false
    this.#tasks.set(task.id, task)
    return true
  }

  taskEnded (task: DefinedTask): void {
    if (this.#tasks.get(task.id) !== task) return
    const expiresAt = expiryOf(task)
    if (expiresAt <= performance.now()) {
      this.#tasks.delete(task.id)
      return
    }
    this.#ended.push(task)
    this.#sweepAt(expiresAt)
    if (this.#ended.length <= 2 * MAX_ENDED) return
    // Half of them are dropped together, so that the cost for each task is small.
    for (const old of this.#ended.slice(0, MAX_ENDED)) {
      if (this.#tasks.get(old.id) === old) this.#tasks.delete(old.id)
    }
    this.#ended = this.#ended.slice(MAX_ENDED)
  }

  /** Lets expired records go when the first of them expires, because a record can hold a large result. */
  #sweepAt (expiresAt: number): void {
    if (expiresAt >= this.#nextSweep) return
    this.#nextSweep = expiresAt
    clearTimeout(this.#timer)
    this.#timer = this.#context.runInAsyncScope(setTimeout, undefined, () => { this.#sweep() }, Math.min(Math.max(expiresAt - performance.now(), MIN_SWEEP_MS), MAX_WAIT_MS)).unref()
  }

  #sweep (): void {
    this.#nextSweep = Infinity
    this.#ended = this.#ended.filter(task => {
      if (this.#tasks.get(task.id) !== task) return false
      if (!isExpired(task)) return true
      this.#tasks.delete(task.id)
      return false
    })
    let next = Infinity
    for (const task of this.#ended) next = Math.min(next, expiryOf(task))
    this.#sweepAt(next)
  }
}

/** The time by `performance.now()` at which the record of a task expires. */
function expiryOf (task: DefinedTask): number {
  const { endedAt, compiled } = task
  if (endedAt === undefined) return Infinity
  const { succeeded, failed } = compiled.definition.keep
  return endedAt + 1_000 * (task.state === 'succeeded' ? succeeded : failed)
}

function isExpired (task: DefinedTask): boolean {
  return performance.now() >= expiryOf(task)
}
