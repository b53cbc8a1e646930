/** The consuming side of the BullMQ engine: one worker per definition. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Worker, WaitingError, type Job as BullJob, type JobJson, type Span, type WorkerOptions } from 'bullmq'
import type { FastifyBaseLogger } from 'fastify'
import { attempt } from '../../foreign.js'
import type { Delivery, Json, TaskSpec, Verdict } from '../engine.js'
import { AttemptFailed, numberedFrom } from './attempts.js'
import { areCancelled } from './cancelled.js'
import type { Client } from './connection.js'
import { countsOf, skippedKey, toDelivery } from './jobs.js'
import { isNotSent } from './redis-errors.js'
import { LARGE, type SizeLimit } from './server.js'

/**
 * A process that died is noticed when the lock of its jobs has run out, plus one check: 6 to 9 s. A handler may block the
 * event loop for 5 s at any time, and for 7 s from its start, before its job starts again elsewhere.
 */
const CRASH_DETECTION = { lockDuration: 7000, lockRenewTime: 2000, runRetryDelay: 1000 } as const
/** The core decides when the attempts are used up, and BullMQ never does. */
const UNBOUNDED = Number.MAX_SAFE_INTEGER
/** Milliseconds until something that Redis refused is tried again. */
const RECOVERY_MS = 1000
/** BullMQ's codes for a job that is not this worker's any more: it is gone, has no lock, does not run, or has the lock of another. */
const LOST: readonly unknown[] = [-1, -2, -3, -6]

// A job that was cancelled meanwhile is not among those that run.
const RESTORE_LOCK = "if redis.call('LPOS', KEYS[2], ARGV[1]) then redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3], 'NX') end"

type TaskBullJob = BullJob<unknown, Json>

/** What a worker is made of. */
export interface TaskWorkerOptions {
  readonly task: TaskSpec
  readonly connection: Client
  readonly prefix: string
  readonly options: Partial<WorkerOptions> | undefined
  readonly run: (delivery: Delivery) => Promise<Verdict>
  readonly sizes: SizeLimit
  readonly log: FastifyBaseLogger
  /** Cancels a job. */
  readonly cancel: (id: string) => Promise<boolean>
  /** Tells that a job that runs here was cancelled. */
  readonly onCancelled: (id: string) => void
  readonly onError: (error: Error) => void
}

export class TaskWorker extends Worker<unknown, Json, string> {
  readonly #task: TaskSpec
  readonly #redis: Client
  readonly #run: (delivery: Delivery) => Promise<Verdict>
  readonly #sizes: SizeLimit
  readonly #log: FastifyBaseLogger
  readonly #cancel: (id: string) => Promise<boolean>
  readonly #onCancelled: (id: string) => void
  /** Settles when, after `pause`, the last job that was fetched has ended. */
  readonly fetchLoop: Promise<void>
  /** Jobs that run, or whose verdict the server does not know yet. */
  #active = 0
  #onIdle: (() => void) | undefined
  /** The latest attempt of each job that runs. */
  readonly #running = new Map<string, TaskBullJob>()

  constructor ({ task, connection, prefix, options, run, sizes, log, cancel, onCancelled, onError }: TaskWorkerOptions) {
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
      // The engine looks for jobs whose process died, of all definitions together.
      skipStalledCheck: true,
      autorun: false
    })
    this.#task = task
    this.#redis = connection
    this.#run = run
    this.#sizes = sizes
    this.#log = log
    this.#cancel = cancel
    this.#onCancelled = onCancelled
    // BullMQ reports a wait for jobs that was cut off. The connection has reported why.
    this.on('error', error => { if (!isNotSent(error)) onError(error) })
    this.fetchLoop = this.run().catch(onError)
  }

  /** Resolves, after `pause`, when nothing runs and the server knows every verdict. */
  async idle (): Promise<void> {
    while (this.#active > 0) await new Promise<void>(resolve => { this.#onIdle = resolve })
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
    const { id = '' } = job
    const earlier = this.#running.get(id)
    // A job of a key whose job was cancelled: nothing else makes another job of the same id while one runs.
    if (earlier !== undefined && earlier.timestamp !== job.timestamp) this.#onCancelled(id)
    this.#running.set(id, job)
    this.#active++
    const ended = super.processJob(job, token, fetchNext)
    const onEnd = (): void => { this.#jobEnded(id, job) }
    ended.then(onEnd, onEnd)
    return ended
  }

  /** The renewal of a lock also brings the news that the job was cancelled, which took its lock. */
  override async extendJobLocks (ids: string[], tokens: string[], duration: number): Promise<string[]> {
    const jobs = ids.map(id => this.#running.get(id))
    const lost = await super.extendJobLocks(ids, tokens, duration)
    if (lost.length === 0) return lost
    const attempts = jobs.filter(job => job !== undefined && lost.includes(job.id ?? '')) as TaskBullJob[]
    const areLost = await areCancelled(this.#redis, this.toKey(''), skippedKey(this), attempts)
    const cancelled = attempts.filter((_, i) => areLost[i])
    for (const job of cancelled) if (this.#running.get(job.id ?? '') === job) this.#onCancelled(job.id ?? '')
    return lost.filter(id => !cancelled.some(job => job.id === id))
  }

  protected override handleCompleted (result: Json, job: TaskBullJob, token: string, fetchNext?: () => boolean, span?: Span): Promise<TaskBullJob> {
    return super.handleCompleted(result, job, token, fetchNext, span).catch((error: unknown) => this.#dropIfCancelled(job, error))
  }

  protected override handleFailed (failure: Error, job: TaskBullJob, token: string, fetchNext?: () => boolean, span?: Span): Promise<TaskBullJob> {
    return super.handleFailed(failure, job, token, fetchNext, span).catch((error: unknown) => this.#dropIfCancelled(job, error))
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
    const counts = countsOf(job)
    const from = numberedFrom(job.stacktrace, counts, typeof job.failedReason === 'string')
    const delivery = toDelivery(this.#task.name, job, from)
    // `pause` does not stop a fetch that is under way.
    const verdict: Verdict = this.isPaused() ? { kind: 'released' } : await this.#run(delivery)
    const made = counts.made + 1
    if (Date.now() - (job.processedOn ?? 0) > (this.opts.lockDuration as number)) await this.#restoreLock(job, token)
    switch (verdict.kind) {
      case 'done':
        return verdict.result === null ? null : await this.#toKept(verdict.result, job)
      case 'cancelled':
        // Somebody may have cancelled the task of this process, and not the job.
        if (!await this.#isCancelled(job)) await this.#cancel(delivery.id)
        // The job has ended, and BullMQ is to do nothing about it.
        throw new WaitingError()
      case 'released':
        await job.moveToWait(token)
        throw new WaitingError()
      case 'retry':
        retryAfter(job, verdict.delayMs)
        throw new AttemptFailed(verdict.error, { attempt: delivery.attempt, made, from: [from.made, from.stalled] })
      case 'failed':
        job.opts.attempts = 0
        // Who puts it back gives it all its attempts again.
        throw new AttemptFailed(verdict.error, { attempt: Math.min(delivery.attempt, this.#task.attempts), made, from: [made, counts.stalled] })
    }
  }

  /** A result that the server would not take ends the connection, and the job would start again. */
  async #toKept (result: Json, { id }: TaskBullJob): Promise<Json> {
    const text = JSON.stringify(result)
    const refusal = text.length > LARGE ? await this.#sizes.refusal('It', text) : undefined
    if (refusal === undefined) return result
    attempt(() => { this.#log.warn({ task: { id, name: this.#task.name } }, `the result of a background task is too large: it is not kept. ${refusal}`) })
    return null
  }

  /**
   * A handler that blocks the event loop keeps the lock from being renewed. Its verdict counts all the same, unless another process has the
   * job by now. Otherwise the job would start again, and block again, until its attempts are used up.
   */
  async #restoreLock (job: TaskBullJob, token: string): Promise<void> {
    const { id = '' } = job
    await this.#redis.eval(RESTORE_LOCK, 2, `${this.toKey(id)}:lock`, this.toKey('active'), id, token, this.opts.lockDuration as number)
  }

  /** What has become of an attempt changes nothing any more if the job was cancelled meanwhile. */
  async #dropIfCancelled (job: TaskBullJob, error: unknown): Promise<TaskBullJob> {
    if (!LOST.includes((error as { code?: unknown }).code) || !await this.#isCancelled(job)) throw error
    // BullMQ takes it for no next job.
    return undefined as unknown as TaskBullJob
  }

  async #isCancelled (job: TaskBullJob): Promise<boolean> {
    const [isCancelled = false] = await areCancelled(this.#redis, this.toKey(''), skippedKey(this), [job])
    return isCancelled
  }

  #jobEnded (id: string, job: TaskBullJob): void {
    const latest = this.#running.get(id)
    if (latest === job) this.#running.delete(id)
    // BullMQ stops to renew the lock of a job by its id, which is that of the latest one, too.
    else if (latest?.token !== undefined) this.lockManager.trackJob(id, latest.token, Date.now())
    this.#active--
    if (this.#active === 0) this.#onIdle?.()
  }
}

/** BullMQ goes by this copy of the job's options, and not by what was stored about attempts. */
function retryAfter (job: TaskBullJob, delayMs: number): void {
  job.opts.attempts = UNBOUNDED
  job.opts.backoff = { type: 'fixed', delay: Math.ceil(delayMs) }
  // Only the error of the last attempt is kept.
  job.opts.stackTraceLimit = 1
}
