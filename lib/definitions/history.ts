import { AsyncResource } from 'node:async_hooks'
import type { JobCounts, JobQuery, JobRecord } from '../engines/engine.js'
import { isBehind, newestFirst } from '../engines/page-order.js'
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
  /** What is told of the ends of tasks, by the name of their definition, while somebody waits. */
  readonly #watches = new Map<string, (ids: readonly string[]) => void>()

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
    return other !== undefined && other !== task && other.jobState !== 'skipped' && other.jobState !== 'abandoned'
  }

  /** Calls back with the id of each task of a definition that ends, until the function that this resolves to is called. */
  async watch (name: string, onEnd: (ids: readonly string[]) => void): Promise<() => void> {
    this.#watches.set(name, onEnd)
    return () => { this.#watches.delete(name) }
  }

  /** Remembers a task in the place of the one of its id. */
  replace (task: DefinedTask): void {
    this.#tasks.set(task.id, task)
  }

  count (name: string): JobCounts {
    const counts = { pending: 0, delayed: 0, running: 0, retrying: 0, failed: 0 }
    for (const { jobState } of this.#of(name)) if (Object.hasOwn(counts, jobState)) counts[jobState as keyof typeof counts]++
    return counts
  }

  query (name: string, { state, limit, after, payload }: JobQuery): JobRecord[] {
    const found = this.#of(name).filter(task => task.jobState === state && isBehind(task.envelope, after))
    return found.sort((a, b) => newestFirst(a.envelope, b.envelope)).slice(0, limit).map(task => task.toRecord(payload))
  }

  #of (name: string): DefinedTask[] {
    return [...this.#tasks.values()].filter(task => task.name === name && !isExpired(task))
  }

  /** Lets a task that is about to start claim its key. False if another task of this key has started. */
  claim (task: DefinedTask): boolean {
    const other = this.find(task.id)
    if (other !== undefined && this.isTaken(task) && other.attempt > 0) return false
    this.#tasks.set(task.id, task)
    return true
  }

  taskEnded (task: DefinedTask): void {
    if (this.#watches.size > 0) this.#watches.get(task.name)?.([task.id])
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
