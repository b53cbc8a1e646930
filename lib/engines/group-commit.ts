import type { Deadline } from './deadlines.js'
import type { Job, Receipt } from './engine.js'

/** Jobs stored in one call at most: a bound for memory, and for how long a group holds up the next one. */
const MAX_JOBS = 500

interface Member {
  readonly jobs: readonly Job[]
  readonly deadline: Deadline
  readonly resolve: (receipts: Receipt[]) => void
  readonly reject: (error: unknown) => void
}

/**
 * Stores the jobs of concurrent requests in one call: while one is under way, the next group gathers. A request alone
 * waits for nobody.
 */
export class GroupCommit {
  readonly #store: (jobs: readonly Job[]) => Promise<Receipt[]>
  #waiting: Member[] = []
  #isBusy = false

  constructor (store: (jobs: readonly Job[]) => Promise<Receipt[]>) {
    this.#store = store
  }

  /** @param deadline if it is over when their turn comes, they are not stored */
  enqueue (jobs: readonly Job[], deadline: Deadline): Promise<Receipt[]> {
    return new Promise((resolve, reject) => {
      this.#waiting.push({ jobs, deadline, resolve, reject })
      if (!this.#isBusy) void this.#run()
    })
  }

  async #run (): Promise<void> {
    this.#isBusy = true
    while (this.#waiting.length > 0) await this.#commit(this.#takeGroup())
    this.#isBusy = false
  }

  /** Those that came first, up to the bound; a job whose id is in the group already waits for the next one. */
  #takeGroup (): Member[] {
    const ids = new Set<string>()
    const group: Member[] = []
    const later: Member[] = []
    for (const member of this.#waiting) {
      if (member.deadline.isOver) continue
      const fits = ids.size === 0 || ids.size + member.jobs.length <= MAX_JOBS
      if (fits && !member.jobs.some(({ id }) => ids.has(id))) {
        for (const { id } of member.jobs) ids.add(id)
        group.push(member)
      } else {
        later.push(member)
      }
    }
    this.#waiting = later
    return group
  }

  async #commit (group: readonly Member[]): Promise<void> {
    if (group.length === 0) return
    try {
      const receipts = await this.#store(group.flatMap(({ jobs }) => jobs))
      let from = 0
      for (const { jobs, resolve } of group) resolve(receipts.slice(from, from += jobs.length))
    } catch (error) {
      if (group.length === 1) {
        for (const { reject } of group) reject(error)
        return
      }
      // One job that the server refuses is not to fail those of strangers.
      await Promise.all(group.map(async ({ jobs, deadline, resolve, reject }) => {
        if (!deadline.isOver) await this.#store(jobs).then(resolve, reject)
      }))
    }
  }
}
