/** Looks for jobs whose process died. */
import type { Client } from './connection.js'
import type { TaskWorker } from './worker.js'

// BullMQ asks once for each queue, although most queues have no running job.
const BUSY = `local busy = {}
for i, key in ipairs(KEYS) do
  if redis.call('LLEN', key) > 0 then busy[#busy + 1] = i end
end
return busy`

/**
 * One check for all definitions of the process. Each process checks at its own pace, so that jobs are found soon enough whichever process
 * died.
 */
export class StalledJobs {
  readonly #client: Client
  readonly #workers: readonly TaskWorker[]
  readonly #everyMs: number
  readonly #onError: (error: Error) => void
  #timer: NodeJS.Timeout | undefined
  #isOver = false

  constructor (client: Client, workers: readonly TaskWorker[], everyMs: number, onError: (error: Error) => void) {
    this.#client = client
    this.#workers = workers
    this.#everyMs = everyMs
    this.#onError = onError
    void this.#look()
  }

  stop (): void {
    this.#isOver = true
    clearTimeout(this.#timer)
  }

  async #look (): Promise<void> {
    try {
      const keys = this.#workers.map(worker => worker.toKey('active'))
      const busy = await this.#client.eval(BUSY, keys.length, ...keys) as number[]
      // The script returns indices from 1 on.
      await Promise.all(busy.map(async index => { await this.#workers[index - 1]?.getBackend().moveStalledJobsToWait() }))
    } catch (error) {
      if (!this.#isOver) this.#onError(error as Error)
    }
    if (!this.#isOver) this.#timer = setTimeout(() => { void this.#look() }, this.#everyMs).unref()
  }
}
