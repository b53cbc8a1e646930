/** Tasks as jobs of BullMQ: what a job carries, how it is read, and how the error of an attempt is stored. */
import { Job as BullJob, type JobJson, type JobsOptions, type Queue } from 'bullmq'
import type { Delivery, Job, Json, TaskSpec } from '../engine.js'
import { toDelivery as readDelivery, toStoredText, type StoredTask } from '../stored-task.js'
import { endedAttempts, type Counts } from './attempts.js'

/** A queue of one definition. */
export type TaskQueue = Queue<StoredTask, Json, string>

/** A definition, with its queue. */
export interface KnownTask {
  readonly spec: TaskSpec
  readonly queue: TaskQueue
}

/** The key of the cancelled jobs whose record may be kept, with the times of their ends. A job among them is cancelled if it has the same time in `failed`. */
export function skippedKey (queue: Pick<TaskQueue, 'toKey'>): string {
  return ownKey(queue, 'skipped')
}

/** A key that BullMQ does not know. It is the id of no job, the name of no definition, and on the node of the queue's other keys. */
export function ownKey (queue: Pick<TaskQueue, 'toKey'>, name: string): string {
  return `${queue.toKey('').slice(0, -1)}~${name}`
}

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

/** @param from the counts from which on attempts are numbered */
export function toDelivery (task: string, job: BullJob<unknown>, from: Counts): Delivery {
  return readDelivery(task, job.id ?? '', endedAttempts(countsOf(job), from) + 1, job.data, job.timestamp)
}

export function countsOf ({ attemptsMade, stalledCounter }: BullJob<unknown>): Counts {
  return { made: attemptsMade, stalled: stalledCounter }
}
