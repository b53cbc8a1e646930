import type { Job } from '../engine.js'
import { isLocked } from './errors.js'

/** Milliseconds for which the server is not asked again for what another transaction holds. */
const HOLD_MS = 500

/**
 * What transactions of others hold, as far as is known: keys, whose job they have stored or deleted and not committed, and queues. Each
 * request that would wait for one of them would hold a connection, and up the requests that are stored in the same call.
 */
export class Holds {
  /** Ids of keyed jobs, and names of queues, with the time until which they count as held. */
  readonly #until = new Map<string, number>()

  /** @throws if one of the jobs would have to wait */
  check (jobs: readonly Job[]): void {
    if (this.#until.size === 0) return
    const now = performance.now()
    for (const [held, until] of this.#until) if (until <= now) this.#until.delete(held)
    const isHeld = jobs.some(({ task, id, keyed }) => this.#until.has(task) || (keyed && this.#until.has(id)))
    if (isHeld) throw new Error('another transaction holds a lock on a job or on its queue')
  }

  /** Learns from the error with which jobs of one queue were not stored. */
  note (jobs: readonly Job[], error: unknown): void {
    const [job] = jobs
    // Which one of several keys it was, the server does not tell. An insert without a key has waited for something that its whole queue waits for.
    if (job !== undefined && isLocked(error) && (jobs.length === 1 || !jobs.some(({ keyed }) => keyed))) {
      this.#until.set(job.keyed ? job.id : job.task, performance.now() + HOLD_MS)
    }
  }
}
