import type { BackgroundTask } from './background-task.js'
import { jobOf } from './task-job.js'

/** Ended tasks of definitions that are remembered at most. */
const MAX_ENDED = 1_000

/**
 * The tasks of definitions that this process runs, or has run: until their `keep` has passed, of those that have ended the
 * last thousand.
 */
export class History {
  readonly #tasks = new Map<string, BackgroundTask>()
  #ended: BackgroundTask[] = []

  find (id: string): BackgroundTask | undefined {
    const task = this.#tasks.get(id)
    if (task === undefined || !isExpired(task)) return task
    this.#tasks.delete(id)
    return undefined
  }

  /** A task was added. One that is there already, with the same key, stays: which of them runs is decided by the first to start. */
  add (task: BackgroundTask): void {
    if (!this.isTaken(task)) this.#tasks.set(task.id, task)
  }

  /** Whether another task of the same key is pending, runs, or has run. */
  isTaken (task: BackgroundTask): boolean {
    const other = this.find(task.id)
    return other !== undefined && other !== task && other.state !== 'skipped' && other.state !== 'abandoned'
  }

  /** A task is about to start: false if another one of its key has. */
  claim (task: BackgroundTask): boolean {
    const other = this.find(task.id)
    if (other !== undefined && this.isTaken(task) && jobOf(other).attempt > 0) return false
    this.#tasks.set(task.id, task)
    return true
  }

  ended (task: BackgroundTask): void {
    if (this.#tasks.get(task.id) !== task) return
    this.#ended.push(task)
    if (this.#ended.length <= 2 * MAX_ENDED) return
    // Half at a time, so that it costs each of them little.
    for (const old of this.#ended.slice(0, MAX_ENDED)) {
      if (this.#tasks.get(old.id) === old) this.#tasks.delete(old.id)
    }
    this.#ended = this.#ended.slice(MAX_ENDED)
  }
}

function isExpired (task: BackgroundTask): boolean {
  const { finishedAt, known } = jobOf(task)
  if (finishedAt === undefined) return false
  const { succeeded, failed } = known.definition.keep
  return Date.now() >= finishedAt + 1_000 * (task.state === 'succeeded' ? succeeded : failed)
}
