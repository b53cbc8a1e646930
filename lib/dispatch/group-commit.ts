import type { Deadline } from './deadlines.js'
import type { Job, Receipt } from '../engines/engine.js'

/** The most jobs in one call, and the most characters of their payloads. They limit the memory, and how long a group holds up the next one. */
const MAX_JOBS = 500
const MAX_TEXT = 4_194_304

interface Member {
  readonly jobs: readonly Job[]
  readonly deadline: Deadline
  readonly resolve: (receipts: Receipt[]) => void
  readonly reject: (error: unknown) => void
}

/**
 * Stores the jobs of concurrent requests in one call. While a call is under way, the next group gathers. A single request does not wait for
 * others.
 */
export class GroupCommit {
  readonly #store: (jobs: readonly Job[]) => Promise<Receipt[]>
  #waiting: Member[] = []
  /** The number of calls under way, the number of requests in them, and the ids of their jobs. */
  #calls = 0
  #requests = 0
  readonly #ids = new Set<string>()

  constructor (store: (jobs: readonly Job[]) => Promise<Receipt[]>) {
    this.#store = store
  }

  /** @param deadline if it is over when their turn comes, the jobs are not stored */
  enqueue (jobs: readonly Job[], deadline: Deadline): Promise<Receipt[]> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ jobs, deadline, resolve, reject })
      this.#next()
    })
  }

  /**
   * Starts a call with the next group, if that is worth it. A second call starts beside the first as soon as it brings as many requests, so
   * that the server is at work while the replies to the others go out. Smaller groups, or more of them, cost more than they gain.
   */
  #next (): void {
    if (this.#calls > 1 || this.#waiting.length < this.#requests) return
    const group = this.#takeGroup()
    if (group.length > 0) void this.#commit(group)
  }

  /**
   * Takes the requests that came first, up to the limits. A request waits if the id of one of its jobs is just being stored, because a
   * server may refuse an id that is in one call twice, and two calls with the same id could lock each other out.
   */
  #takeGroup (): Member[] {
    const group: Member[] = []
    const later: Member[] = []
    let size = 0
    let text = 0
    for (const member of this.#waiting) {
      const { jobs, deadline } = member
      if (deadline.isOver) continue
      const length = jobs.reduce((sum, { text }) => sum + text.length, 0)
      const fits = size === 0 || (size + jobs.length <= MAX_JOBS && text + length <= MAX_TEXT)
      if (fits && !jobs.some(({ id }) => this.#ids.has(id))) {
        for (const { id } of jobs) this.#ids.add(id)
        size += jobs.length
        text += length
        group.push(member)
      } else {
        later.push(member)
      }
    }
    this.#waiting = later
    return group
  }

  async #commit (group: readonly Member[]): Promise<void> {
    this.#calls++
    this.#requests += group.length
    const jobs = group.flatMap(({ jobs }) => jobs)
    await this.#storeGroup(group, jobs)
    this.#calls--
    this.#requests -= group.length
    for (const { id } of jobs) this.#ids.delete(id)
    this.#next()
  }

  async #storeGroup (group: readonly Member[], allJobs: readonly Job[]): Promise<void> {
    try {
      const receipts = await this.#store(allJobs)
      let from = 0
      for (const { jobs, resolve } of group) resolve(receipts.slice(from, from += jobs.length))
    } catch (error) {
      if (group.length === 1) {
        for (const { reject } of group) reject(error)
        return
      }
      // A job that the server refuses must not fail the jobs of other requests.
      await Promise.all(group.map(async ({ jobs, deadline, resolve, reject }) => {
        if (!deadline.isOver) await this.#store(jobs).then(resolve, reject)
      }))
    }
  }
}
