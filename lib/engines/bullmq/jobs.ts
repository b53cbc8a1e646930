/** Tasks as jobs of BullMQ: what a job carries, how it is read, and how the error of an attempt is stored. */
import { Job as BullJob, type JobJson, type JobsOptions, type Queue } from 'bullmq'
import type { Delivery, Job, JobError, Json } from '../engine.js'
import { toDelivery as readDelivery, toStoredText, type StoredTask } from '../stored-task.js'

/** A queue of one definition. */
export type TaskQueue = Queue<StoredTask, Json, string>

/** A job whose data is JSON already. BullMQ would make JSON once more, of what was parsed. */
export class JsonJob extends BullJob<JsonData | undefined, Json, string> {
  override asJSON (): JobJson {
    const { data } = this
    this.data = undefined
    const json = Object.assign(super.asJSON(), { data: data?.text })
    this.data = data
    return json
  }
}

/** A {@link StoredTask} as JSON. */
export class JsonData {
  readonly text: string

  constructor (job: Job) {
    this.text = toStoredText(job)
  }

  /** A later BullMQ that makes JSON of a job in another way gets the same. */
  toJSON (): unknown {
    return JSON.parse(this.text)
  }
}

/** The worker, and not the job, decides how long a record is kept, so that the records of jobs written by hand are kept as long. */
export function toJobOptions ({ id, delayMs, enqueuedAt }: Job): JobsOptions {
  if (delayMs <= 0) return { jobId: id, timestamp: enqueuedAt }
  // BullMQ counts a delay from the timestamp.
  return { jobId: id, timestamp: enqueuedAt, delay: Math.max(1, Math.ceil(Date.now() + delayMs - enqueuedAt)) }
}

export function toDelivery (task: string, job: BullJob<unknown>): Delivery {
  return readDelivery(task, job.id ?? '', endedAttempts(job.attemptsMade, job.stalledCounter) + 1, job.data, job.timestamp)
}

/**
 * Attempts that have ended. `attemptsMade` rises with every verdict but `released`, and `stalledCounter` with every attempt whose process
 * died. `attemptsStarted` also counts the attempts of jobs that were returned to the engine.
 */
export function endedAttempts (attemptsMade: number, stalledCounter: number): number {
  return attemptsMade + stalledCounter
}

/**
 * The error of an attempt, as BullMQ takes it. People and dashboards read its message, `failedReason`. What BullMQ keeps as the stack is
 * the error itself as JSON, which `get` reads.
 */
export class AttemptFailed extends Error {
  override readonly name = 'AttemptFailed'

  constructor (error: JobError) {
    // The bare message is never used: BullMQ takes the message `bullmq:rateLimitExceeded` for an order.
    super(`${error.name}: ${error.message}`)
    this.stack = JSON.stringify(error)
  }
}
