/** The consuming side of the BullMQ engine: one worker per definition. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Worker, WaitingError, type Job as BullJob, type JobJson, type WorkerOptions } from 'bullmq'
import type { Redis } from 'ioredis'
import type { Delivery, Json, TaskSpec, Verdict } from '../engine.js'
import { AttemptFailed, toDelivery } from './jobs.js'

/**
 * A process that died is noticed when the lock of its jobs has run out, plus one check: 6 to 8 s. A handler may block the
 * event loop for 5 s at any time, and for 7 s from its start, before its job starts again elsewhere.
 */
const CRASH_DETECTION = { lockDuration: 7000, lockRenewTime: 2000, stalledInterval: 1000, runRetryDelay: 1000 } as const
/** The core decides when the attempts are used up, and BullMQ never does. */
const UNBOUNDED = Number.MAX_SAFE_INTEGER
/** Milliseconds until something that Redis refused is tried again. */
const RECOVERY_MS = 1000

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
  /** Settles when, after `pause`, the last job that was fetched has ended. */
  readonly #fetchLoop: Promise<void>
  /** Jobs that run, or whose verdict the server does not know yet. */
  #active = 0
  #onIdle: (() => void) | undefined
  readonly #onJobEnd = (): void => {
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
    // BullMQ reports a wait for jobs that was cut off. The connection has reported why.
    this.on('error', error => { if (error.name !== 'MaxRetriesPerRequestError') onError(error) })
    this.#endWaitsWithConnection().catch(onError)
    this.#fetchLoop = this.run().catch(onError)
  }

  /** Resolves, after `pause`, when nothing runs, the server knows every verdict, and jobs that were fetched too late are back in the queue. */
  async idle (): Promise<void> {
    while (this.#active > 0) await new Promise<void>(resolve => { this.#onIdle = resolve })
    if (this.#redis.status !== 'ready') return
    // The fetch loop waits up to 10 s for a job. When its connection is cut, it reconnects and sees that the worker is paused.
    await this.getBackend().disconnectBlocking(false)
    await this.#fetchLoop
  }

  /** Data that is no JSON, which someone may have written to Redis, is delivered as a text. Nobody else would ever end that job. */
  protected override createJob (stored: JobJson, id: string): TaskBullJob {
    try {
      return super.createJob(stored, id)
    } catch {
      return super.createJob({ ...stored, data: JSON.stringify(stored.data) }, id)
    }
  }

  /** A job counts as active from its fetch until the server knows what has become of it. */
  override processJob (job: TaskBullJob, token: string, fetchNext?: () => boolean): Promise<void | TaskBullJob> {
    this.#active++
    const ended = super.processJob(job, token, fetchNext)
    ended.then(this.#onJobEnd, this.#onJobEnd)
    return ended
  }

  /** A wait for jobs ends when its connection is lost. ioredis would send the command again, and a timer of BullMQ would outlive `stop`. */
  async #endWaitsWithConnection (): Promise<void> {
    const client = await this.getBackend().blockingClient
    if (client !== undefined) client.options.maxRetriesPerRequest = 0
  }

  /** BullMQ itself fetches again immediately: 5,700 times per second from a server whose memory is full. */
  protected override async moveToActive (token: string, name?: string): Promise<TaskBullJob> {
    try {
      return await super.moveToActive(token, name)
    } catch (error) {
      await sleep(RECOVERY_MS, undefined, { ref: false })
      throw error
    }
  }

  async #attempt (job: TaskBullJob, token: string): Promise<Json> {
    // A job does not end because BullMQ failed to carry out a verdict.
    retryAfter(job, RECOVERY_MS)
    // `pause` does not stop a fetch that is under way.
    const verdict: Verdict = this.isPaused() ? { kind: 'released' } : await this.#run(toDelivery(this.#task, job))
    if (Date.now() - (job.processedOn ?? 0) > (this.opts.lockDuration as number)) await this.#restoreLock(job, token)
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
   * A handler that blocks the event loop keeps the lock from being renewed. Its verdict counts all the same, unless another process has the
   * job by now. Otherwise the job would start again, and block again, until its attempts are used up.
   */
  async #restoreLock (job: TaskBullJob, token: string): Promise<void> {
    await this.#redis.set(`${this.toKey(job.id ?? '')}:lock`, token, 'PX', this.opts.lockDuration as number, 'NX')
  }
}

/** BullMQ goes by this copy of the job's options, and not by what was stored about attempts. */
function retryAfter (job: TaskBullJob, delayMs: number): void {
  job.opts.attempts = UNBOUNDED
  job.opts.backoff = { type: 'fixed', delay: Math.ceil(delayMs) }
  // Only the error of the last attempt is kept.
  job.opts.stackTraceLimit = 1
}
