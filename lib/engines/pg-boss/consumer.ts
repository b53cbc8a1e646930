import type { Delivery, TaskSpec, Verdict } from '../engine.js'
import { boundedDelay, type FetchedJob, toDelivery } from './jobs.js'
import type { PgBossServer } from './server.js'
import { PgBossSettler } from './settler.js'
import { type Fate, keepTimes, type Settlement, type Start } from './statements.js'
import { isObject } from '../stored-task.js'
import { toOutput } from './values.js'

/**
 * A fetch takes 2 to 4 ms, however few jobs it brings. So jobs are taken in advance: those that will start within so many milliseconds,
 * as the durations of the last jobs tell, which are none of slow jobs. With 1,000 instead of 2,000, drains had 0.85 of the rate.
 */
const AHEAD_MS = 50
const MAX_AHEAD = 2_000
/** Characters of JSON that are taken in advance, so that large payloads do not fill the memory. One job of each fetch tells the size. */
const MAX_AHEAD_SIZE = 16_777_216
/** Milliseconds after which a job that was taken in advance, and had to wait after all, is returned. */
const STALE_MS = 200
/** Milliseconds that a job is expected to last before any has ended. After 60 quick jobs, jobs are taken in advance. */
const SLOW_MS = 1_000
/** Most jobs whose verdicts the server does not know. At this number no more are taken. */
const MAX_UNSETTLED = 2_000
/** Seconds: a record that is kept for less may be gone before a worker looks for it. */
const SHORT_KEEP = 10
/** Milliseconds until a job is looked at again whose start before this one has not ended here. */
const AGAIN_MS = 100

/** A job that this process has taken, and has not settled. */
interface TakenJob {
  readonly job: FetchedJob
  /** The time of its fetch, and after its start the time of its start. */
  since: number
}

/** What a consumer also tells its worker. */
export interface ConsumerEvents {
  /** These starts may have been cancelled. */
  readonly onMentioned?: (starts: readonly Start[]) => void
  /** The server knows these verdicts now. */
  readonly onSettled?: (settlements: readonly Settlement[]) => void
}

/**
 * Runs the jobs of one queue. pg-boss counts an attempt when it hands a job out. When the process dies, the jobs that it had fetched and not
 * yet started, within the last 200 ms, have lost an attempt too. So a job that has only one attempt is never taken in advance.
 */
export class PgBossConsumer {
  readonly #spec: TaskSpec
  readonly #server: PgBossServer
  readonly #run: (delivery: Delivery) => Promise<Verdict>
  readonly #settler: PgBossSettler
  readonly #keep: TaskSpec['keep']
  /** By id, or by itself where a job that counted as lost has started here once more. */
  readonly #running = new Map<unknown, TakenJob>()
  #waiting: TakenJob[] = []
  /** Milliseconds that a job lasts, as an average of the last ones. */
  #duration = SLOW_MS
  /** Characters of a job, rather too many than too few. */
  #size = 1
  #mayHaveJobs = false
  #isFetching = false
  #isPaused = false
  /** Ids of which somebody has said, during a fetch, that they were cancelled. */
  readonly #mentioned = new Set<string>()
  readonly #onMentioned: ConsumerEvents['onMentioned']
  #staleTimer: NodeJS.Timeout | undefined
  #onChange: (() => void) | undefined

  /** @param onReturned called when a job was returned to its queue, and is due again in so many milliseconds */
  constructor (spec: TaskSpec, server: PgBossServer, run: (delivery: Delivery) => Promise<Verdict>, onReturned: (ms: number) => void, { onMentioned, onSettled }: ConsumerEvents = {}) {
    this.#onMentioned = onMentioned
    this.#spec = spec
    this.#server = server
    this.#run = run
    this.#keep = keepTimes(spec.keep)
    this.#settler = new PgBossSettler(spec.name, server, settlements => {
      onSettled?.(settlements)
      for (const { delay } of settlements) if (delay !== undefined) onReturned(delay)
      // The limit of unsettled jobs may have stopped the fetching.
      this.#fill()
      this.#changed()
    })
  }

  get name (): string {
    return this.#spec.name
  }

  /** Whether this consumer would take a job if it learned of one. */
  get isWaiting (): boolean {
    return !this.#mayHaveJobs && !this.#isPaused
  }

  /** The queue may have jobs that can start. */
  wake (): void {
    this.#mayHaveJobs = true
    this.#fill()
  }

  /** Takes no further jobs, and returns those that have not started. */
  pause (): void {
    this.#isPaused = true
    this.#return(this.#waiting.splice(0))
  }

  /** Resolves when nothing runs and the server knows every verdict. */
  async idle (): Promise<void> {
    while (this.#isFetching || this.#running.size > 0 || !this.#settler.isIdle) {
      await new Promise<void>(resolve => { this.#onChange = resolve })
    }
  }

  /** The jobs that run, except those that have just started. */
  running (olderThanMs: number): Start[] {
    const limit = performance.now() - olderThanMs
    return Array.from(this.#running.values()).filter(({ since }) => since <= limit).map(({ job }) => this.#toStart(job))
  }

  /** Somebody has said that this job was cancelled. It may be another one by now, because its key is free. */
  mention (id: string): void {
    const starts = [...this.#running.values(), ...this.#waiting].filter(({ job }) => job.id === id).map(({ job }) => this.#toStart(job))
    if (starts.length > 0) this.#onMentioned?.(starts)
    else if (this.#isFetching) this.#mentioned.add(id)
  }

  /**
   * Stops a job if it was cancelled, as the server says.
   * @param fate undefined if there is no such job any more
   * @param isMentioned whether somebody has said that it was cancelled
   */
  learn ({ id, start }: Start, fate: Fate | undefined, isMentioned: boolean): void {
    const isIt = ({ job }: TakenJob): boolean => job.id === id && job.expireInSeconds === start
    const running = Array.from(this.#running.values()).find(isIt)
    const taken = running ?? this.#waiting.find(isIt)
    if (taken === undefined || !this.#isCancelled(taken, fate, isMentioned)) return
    if (running !== undefined) return this.#server.cancelled(this.name, id)
    this.#waiting = this.#waiting.filter(waiting => waiting !== taken)
    this.#fill()
  }

  /** A job that was lost in a failover, or that another process has started because this one was silent, was not cancelled. */
  #isCancelled ({ job: { data, expireInSeconds } }: TakenJob, fate: Fate | undefined, isMentioned: boolean): boolean {
    if (fate === undefined) return isMentioned || this.#keep.failed <= SHORT_KEEP
    const { state, start, isPutBack, enqueuedAt } = fate
    const isLast = start === expireInSeconds
    if (state === 'cancelled' || (isMentioned && !(isLast && state === 'active'))) return true
    // It was cancelled and put back, or its key was free and was stored again.
    return (isLast && isPutBack) || JSON.stringify(enqueuedAt ?? null) !== JSON.stringify((isObject(data) ? data['enqueuedAt'] : undefined) ?? null)
  }

  #toStart ({ id, expireInSeconds: start }: FetchedJob): Start {
    return { name: this.name, id, start }
  }

  close (): void {
    clearTimeout(this.#staleTimer)
    this.#settler.close()
  }

  #fill (): void {
    if (!this.#mayHaveJobs || this.#isFetching || this.#isPaused) return
    const count = this.#countToFetch()
    if (count > 0) void this.#fetch(count)
  }

  #countToFetch (): number {
    const { concurrency, attempts } = this.#spec
    const ahead = attempts === 1 ? 0 : Math.floor(Math.min(concurrency * AHEAD_MS / this.#duration, MAX_AHEAD, MAX_AHEAD_SIZE / this.#size))
    const room = concurrency + ahead - this.#running.size - this.#waiting.length
    // While there are jobs to start, a fetch for a handful more does not pay.
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
    const mentioned = Array.from(this.#mentioned)
    this.#mentioned.clear()
    for (const id of mentioned) this.mention(id)
    this.#fill()
    this.#changed()
  }

  #take (jobs: readonly FetchedJob[]): void {
    const since = performance.now()
    this.#waiting.push(...jobs.map(job => ({ job, since })))
    if (this.#isPaused) this.#return(this.#waiting.splice(0))
    this.#startWaiting()
    if (this.#waiting.length > 0) this.#staleTimer ??= setTimeout(() => { this.#returnStale() }, STALE_MS)
  }

  #startWaiting (): void {
    while (this.#running.size < this.#spec.concurrency) {
      const taken = this.#waiting.shift()
      if (taken === undefined) return
      const { job } = taken
      const before = this.#running.get(job.id)
      if (before !== undefined && job.retryCount <= before.job.retryCount) {
        this.#returnUntilEnded(job)
        continue
      }
      taken.since = performance.now()
      this.#running.set(before === undefined ? job.id : taken, taken)
      void this.#run(toDelivery(this.name, job)).then(verdict => { this.#ended(taken, verdict) })
    }
  }

  /** A job was cancelled and put back, or its key was stored again, before this process heard of it. Its earlier start runs here. */
  #returnUntilEnded (job: FetchedJob): void {
    this.#server.cancelled(this.name, job.id)
    this.#settler.add({ ...this.#toSettlement(job, { kind: 'released' }), delay: AGAIN_MS })
  }

  #ended (taken: TakenJob, verdict: Verdict): void {
    this.#running.delete(this.#running.get(taken.job.id) === taken ? taken.job.id : taken)
    this.#duration += (performance.now() - taken.since - this.#duration) / 16
    this.#settler.add(this.#toSettlement(taken.job, verdict))
    this.#startWaiting()
    this.#fill()
  }

  #returnStale (): void {
    this.#staleTimer = undefined
    const limit = performance.now() - STALE_MS
    const count = this.#waiting.findLastIndex(({ since }) => since <= limit) + 1
    if (count > 0) this.#duration = SLOW_MS
    this.#return(this.#waiting.splice(0, count))
    if (this.#waiting.length > 0) this.#staleTimer = setTimeout(() => { this.#returnStale() }, STALE_MS)
  }

  #return (jobs: readonly TakenJob[]): void {
    for (const { job } of jobs) this.#settler.add(this.#toSettlement(job, { kind: 'released' }))
  }

  #toSettlement ({ id, retryCount: attemptsBefore, expireInSeconds: start }: FetchedJob, verdict: Verdict): Settlement {
    switch (verdict.kind) {
      case 'done': return { id, start, state: 'completed', output: toOutput(verdict.result), keep: this.#keep.succeeded }
      case 'failed': return { id, start, state: 'failed', output: toOutput({ ...verdict.error }), keep: this.#keep.failed }
      case 'retry': return { id, start, state: 'retry', output: toOutput({ ...verdict.error }), delay: boundedDelay(verdict.delayMs) }
      case 'cancelled': return { id, start, state: 'cancelled', keep: this.#keep.failed }
      case 'released': return { id, start, state: attemptsBefore > 0 ? 'retry' : 'created', uncounted: true }
    }
  }

  #changed (): void {
    this.#onChange?.()
    this.#onChange = undefined
  }
}
