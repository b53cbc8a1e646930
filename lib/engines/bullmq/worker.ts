/** The consuming side of the BullMQ engine: one worker per definition. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Worker, WaitingError, type Job as BullJob, type JobJson, type WorkerOptions } from 'bullmq'
import type { Redis } from 'ioredis'
import type { Delivery, Json, TaskSpec, Verdict } from '../engine.js'
import { AttemptFailed, toDelivery } from './records.js'

/**
 * A process that died is noticed when the lock of its jobs has run out, plus one check: 6 to 8 s. A handler may block the
 * event loop for 5 s at any time, and for 7 s from its start, before its job starts again elsewhere.
 */
const CRASH_DETECTION = { lockDuration: 7000, lockRenewTime: 2000, stalledInterval: 1000, runRetryDelay: 1000 } as const
/** `run` decides when attempts are used up; BullMQ never does. */
const UNBOUNDED = Number.MAX_SAFE_INTEGER
/** Milliseconds after which is tried again what Redis refused. */
const RECOVERY_DELAY = 1000

type TaskBullJob = BullJob<unknown, Json>

/** What a worker is made of. */
export interface TaskWorkerOptions {
  readonly task: TaskSpec
  readonly connection: Redis
  readonly prefix: string
  readonly options: Partial<WorkerOptions> | undefined
  readonly run: (delivery: Delivery) => Promise<Verdict>
  readonly onError: (error: Error) => void
}

export class TaskWorker extends Worker<unknown, Json, string> {
  readonly #task: string
  readonly #redis: Redis
  readonly #run: (delivery: Delivery) => Promise<Verdict>
  /** Settles when, after `pause`, the last job that was fetched is done. */
  readonly #loop: Promise<void>
  /** Jobs that run, or whose verdict the server does not know yet. */
  #active = 0
  #onIdle: (() => void) | undefined
  readonly #end = (): void => {
    this.#active--
    if (this.#active === 0) this.#onIdle?.()
  }

  constructor ({ task, connection, prefix, options, run, onError }: TaskWorkerOptions) {
    super(task.name, (job, token = '') => this.#attempt(job, token), {
      ...CRASH_DETECTION,
      ...options,
      connection,
      prefix,
      concurrency: task.concurrency,
      removeOnComplete: { age: task.keep.succeeded },
      removeOnFail: { age: task.keep.failed },
      maxStalledCount: UNBOUNDED,
      maxStartedAttempts: 0,
      autorun: false
    })
    this.#task = task.name
    this.#redis = connection
    this.#run = run
    // A wait for jobs that was cut off says so; the connection has said why.
    this.on('error', error => { if (error.name !== 'MaxRetriesPerRequestError') onError(error) })
    this.#cutWaits().catch(onError)
    this.#loop = this.run().catch(onError)
  }

  /** After `pause`: resolves when nothing runs, the server knows every verdict, and what was fetched too late is put back. */
  async settled (): Promise<void> {
    while (this.#active > 0) await new Promise<void>(resolve => { this.#onIdle = resolve })
    if (this.#redis.status !== 'ready') return
    // It waits up to 10 s for a job. Cut off, it reconnects, and sees that it is paused.
    await this.getBackend().disconnectBlocking(false)
    await this.#loop
  }

  /** Data that is no JSON, as a raw write may leave it, is delivered as text. Nobody else would ever end that job. */
  protected override createJob (stored: JobJson, id: string): TaskBullJob {
    try {
      return super.createJob(stored, id)
    } catch {
      return super.createJob({ ...stored, data: JSON.stringify(stored.data) }, id)
    }
  }

  /** From the fetch of a job until the server knows what has become of it. */
  override processJob (job: TaskBullJob, token: string, fetchNext?: () => boolean): Promise<void | TaskBullJob> {
    this.#active++
    const ended = super.processJob(job, token, fetchNext)
    ended.then(this.#end, this.#end)
    return ended
  }

  /** A wait whose connection is lost ends there: ioredis would send it again, and a timer of BullMQ outlive `stop`. */
  async #cutWaits (): Promise<void> {
    const client = await this.getBackend().blockingClient
    if (client !== undefined) client.options.maxRetriesPerRequest = 0
  }

  /** BullMQ itself fetches again at once: 5,700 times a second from a server whose memory is full. */
  protected override async moveToActive (token: string, name?: string): Promise<TaskBullJob> {
    try {
      return await super.moveToActive(token, name)
    } catch (error) {
      await sleep(RECOVERY_DELAY, undefined, { ref: false })
      throw error
    }
  }

  async #attempt (job: TaskBullJob, token: string): Promise<Json> {
    // Should BullMQ fail to carry a verdict out, the job is not to end by that.
    retryAfter(job, RECOVERY_DELAY)
    // `pause` does not stop a fetch that is under way.
    const verdict: Verdict = this.isPaused() ? { kind: 'released' } : await this.#run(toDelivery(this.#task, job))
    if (Date.now() - (job.processedOn ?? 0) > (this.opts.lockDuration as number)) await this.#keepLock(job, token)
    switch (verdict.kind) {
      case 'done':
        return verdict.result
      case 'released':
        await job.moveToWait(token)
        throw new WaitingError()
      case 'retry':
        retryAfter(job, verdict.delayMs)
        throw new AttemptFailed(verdict.error)
      case 'failed':
        job.opts.attempts = 0
        throw new AttemptFailed(verdict.error)
    }
  }

  /**
   * A handler that blocks the event loop keeps the lock from being renewed. Unless the job has been given to someone else
   * meanwhile, its verdict counts: else it would start again, and block again, until its attempts are used up.
   */
  async #keepLock (job: TaskBullJob, token: string): Promise<void> {
    await this.#redis.set(`${this.toKey(job.id ?? '')}:lock`, token, 'PX', this.opts.lockDuration as number, 'NX')
  }
}

/** What the stored options say about attempts does not matter: this copy is what BullMQ goes by. */
function retryAfter (job: TaskBullJob, delayMs: number): void {
  job.opts.attempts = UNBOUNDED
  job.opts.backoff = { type: 'fixed', delay: Math.ceil(delayMs) }
  // Of the last attempt alone.
  job.opts.stackTraceLimit = 1
}
