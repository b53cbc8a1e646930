import type { Delivery, TaskSpec, Verdict } from '../engine.js'
import { type FetchedJob, storable, toDelivery } from './jobs.js'
import type { PgBossServer } from './server.js'
import { PgBossSettler } from './settler.js'
import { keepTimes, type Settlement } from './statements.js'

/**
 * A fetch costs 2 to 4 ms, however few jobs it brings, so jobs are taken in advance: those that will start within so many
 * milliseconds, as their durations of late tell. None of slow jobs. With 1,000 in place of 2,000, drains had 0.85 of the rate.
 */
const AHEAD_MS = 50
const MAX_AHEAD = 2_000
/** Characters of JSON that are taken in advance, as one job of each fetch tells: large payloads are not to fill the memory. */
const MAX_AHEAD_SIZE = 16_777_216
/** Milliseconds after which a job that was taken in advance, and had to wait after all, is given back. */
const STALE_MS = 200
/** Milliseconds that a job is taken to last before any has ended: 60 quick ones later, jobs are taken in advance. */
const SLOW_MS = 1_000
/** Jobs whose verdicts the server does not know: no more are taken. */
const MAX_UNSETTLED = 2_000

/** A job that this process has. */
interface Held {
  readonly job: FetchedJob
  /** When it was fetched, and then when it was started. */
  since: number
}

/**
 * Runs the jobs of one queue. pg-boss counts a start when it hands a job out: when the process dies, the jobs that it had
 * fetched and not yet started, for 200 ms at most, have lost an attempt too. So jobs that may start only once are not taken in advance.
 */
export class PgBossConsumer {
  readonly #spec: TaskSpec
  readonly #server: PgBossServer
  readonly #run: (delivery: Delivery) => Promise<Verdict>
  readonly #settler: PgBossSettler
  readonly #keep: TaskSpec['keep']
  readonly #running = new Set<Held>()
  #waiting: Held[] = []
  #lasts = SLOW_MS
  /** Characters of a job, rather too many than too few. */
  #size = 1
  #mayHaveJobs = true
  #isFetching = false
  #isPaused = false
  #stale: NodeJS.Timeout | undefined
  #onIdle: (() => void) | undefined

  /** @param onPutBack called when a job is due again in so many milliseconds */
  constructor (spec: TaskSpec, server: PgBossServer, run: (delivery: Delivery) => Promise<Verdict>, onPutBack: (ms: number) => void) {
    this.#spec = spec
    this.#server = server
    this.#run = run
    this.#keep = keepTimes(spec.keep)
    this.#settler = new PgBossSettler(spec.name, server, settlements => {
      for (const { delay } of settlements) if (delay !== undefined) onPutBack(delay)
      // The bound for unsettled jobs may have held it up.
      this.#fill()
      this.#changed()
    })
  }

  get name (): string {
    return this.#spec.name
  }

  /** Whether it would take a job that is said to be there. */
  get isWaiting (): boolean {
    return !this.#mayHaveJobs && !this.#isPaused
  }

  /** The queue may have jobs that can start. */
  wake (): void {
    this.#mayHaveJobs = true
    this.#fill()
  }

  /** Gives back what has not started. */
  pause (): void {
    this.#isPaused = true
    this.#giveBack(this.#waiting.splice(0))
  }

  /** Resolves when nothing runs and the server knows all verdicts. */
  async idle (): Promise<void> {
    while (this.#isFetching || this.#running.size > 0 || !this.#settler.isIdle) {
      await new Promise<void>(resolve => { this.#onIdle = resolve })
    }
  }

  /** Signs of life of what runs, except for jobs that have just been started. */
  async touch (olderThanMs: number): Promise<void> {
    const limit = performance.now() - olderThanMs
    const jobs = Array.from(this.#running).filter(({ since }) => since <= limit).map(({ job }) => job)
    if (jobs.length > 0) await this.#settler.touch(jobs.map(({ id, retryCount }) => ({ id, retryCount })))
  }

  close (): void {
    clearTimeout(this.#stale)
  }

  #fill (): void {
    if (!this.#mayHaveJobs || this.#isFetching || this.#isPaused) return
    const count = this.#room()
    if (count > 0) void this.#fetch(count)
  }

  /** How many jobs to fetch. */
  #room (): number {
    const { concurrency, attempts } = this.#spec
    const ahead = attempts === 1 ? 0 : Math.floor(Math.min(concurrency * AHEAD_MS / this.#lasts, MAX_AHEAD, MAX_AHEAD_SIZE / this.#size))
    const room = concurrency + ahead - this.#running.size - this.#waiting.length
    // While there are jobs to start, not for a handful.
    if (this.#waiting.length > 0 && room < ahead / 4) return 0
    return Math.min(room, MAX_UNSETTLED - this.#settler.size)
  }

  async #fetch (batchSize: number): Promise<void> {
    this.#isFetching = true
    this.#mayHaveJobs = false
    try {
      const jobs = await this.#server.fetch(this.name, batchSize)
      if (jobs.length === batchSize) this.#mayHaveJobs = true
      this.#take(jobs)
      this.#size = Math.max(JSON.stringify([jobs[0]?.data]).length, this.#size * 0.75)
    } catch (error) {
      this.#server.report(error)
      this.#mayHaveJobs = true
      await this.#server.pause()
    }
    this.#isFetching = false
    this.#fill()
    this.#changed()
  }

  #take (jobs: readonly FetchedJob[]): void {
    const since = performance.now()
    this.#waiting.push(...jobs.map(job => ({ job, since })))
    if (this.#isPaused) this.#giveBack(this.#waiting.splice(0))
    this.#startWaiting()
    if (this.#waiting.length > 0) this.#stale ??= setTimeout(() => { this.#giveBackStale() }, STALE_MS)
  }

  #startWaiting (): void {
    while (this.#running.size < this.#spec.concurrency) {
      const held = this.#waiting.shift()
      if (held === undefined) return
      held.since = performance.now()
      this.#running.add(held)
      void this.#run(toDelivery(this.name, held.job)).then(verdict => { this.#ended(held, verdict) })
    }
  }

  #ended (held: Held, verdict: Verdict): void {
    this.#running.delete(held)
    this.#lasts += (performance.now() - held.since - this.#lasts) / 16
    this.#settler.add(this.#toSettlement(held.job, verdict))
    this.#startWaiting()
    this.#fill()
  }

  #giveBackStale (): void {
    this.#stale = undefined
    const limit = performance.now() - STALE_MS
    const count = this.#waiting.findLastIndex(({ since }) => since <= limit) + 1
    if (count > 0) this.#lasts = SLOW_MS
    this.#giveBack(this.#waiting.splice(0, count))
    if (this.#waiting.length > 0) this.#stale = setTimeout(() => { this.#giveBackStale() }, STALE_MS)
  }

  #giveBack (helds: readonly Held[]): void {
    for (const { job } of helds) this.#settler.add(this.#toSettlement(job, { kind: 'released' }))
  }

  #toSettlement ({ id, retryCount: starts }: FetchedJob, verdict: Verdict): Settlement {
    switch (verdict.kind) {
      case 'done': return { id, starts, state: 'completed', output: storable(verdict.result), keep: this.#keep.succeeded }
      case 'failed': return { id, starts, state: 'failed', output: storable(verdict.error), keep: this.#keep.failed }
      case 'retry': return { id, starts, state: 'retry', output: storable(verdict.error), delay: verdict.delayMs }
      case 'released': return { id, starts, state: starts > 0 ? 'retry' : 'created', uncounted: true }
    }
  }

  #changed (): void {
    this.#onIdle?.()
    this.#onIdle = undefined
  }
}
