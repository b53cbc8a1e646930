/** Tasks as jobs of pg-boss: what is stored, and how a job and its record are read. */
import type { JobInsert, JobWithMetadata } from 'pg-boss'
import type { Delivery, Job, JobError, JobRecord, JobState, Json } from '../engine.js'
import { enqueuedAtOf, isObject, readJobError, toDelivery as readDelivery, toIso, toStored } from '../stored-task.js'

/** A job as a queue hands it out. */
export interface FetchedJob {
  readonly id: string
  readonly data: unknown
  /** Attempts before this one. */
  readonly retryCount: number
}

export function toInsert (job: Job): JobInsert {
  const { id, delayMs, enqueuedAt } = job
  const data = toStored(job)
  data.enqueuedAt = enqueuedAt
  // An interval is counted by the server's clock.
  return delayMs > 0 ? { id, data, startAfter: `${Math.ceil(delayMs)} milliseconds` } : { id, data }
}

export function toDelivery (task: string, { id, data, retryCount }: FetchedJob): Delivery {
  return readDelivery(task, id, retryCount + 1, data)
}

export function toRecord (task: string, job: JobWithMetadata<unknown>): JobRecord {
  // An attempt that was returned to the engine leaves no start.
  const started = toIso(job.startedOn)
  const attempt = job.retryCount + (started === undefined ? 0 : 1)
  const finished = toIso(job.completedOn)
  const state = toState(job, attempt)
  // Drivers differ in what they make of a JSON column.
  const output: unknown = job.output
  return {
    id: job.id,
    name: task,
    state,
    attempt,
    enqueuedAt: toIso(enqueuedAtOf(job.data)) ?? toIso(job.createdOn) ?? new Date(0).toISOString(),
    ...(started !== undefined && { startedAt: started }),
    ...(finished !== undefined && { finishedAt: finished }),
    ...((state === 'failed' || state === 'retrying') && { error: toError(output) }),
    ...(state === 'succeeded' && { result: output as Json })
  }
}

const ESCAPES = /\\(?:u0000|ud[89a-f][0-9a-f]{2}|.)/g
const isUnstorable = (escape: string): boolean => escape.length > 2

/** Whether jsonb accepts the value: it refuses U+0000 and half of a surrogate pair. */
export function isStorable (value: unknown): boolean {
  return !JSON.stringify(value).match(ESCAPES)?.some(isUnstorable)
}

/** JSON that jsonb accepts. Each character that it refuses becomes U+FFFD. */
export function storable (value: Json | JobError): Json {
  const json = JSON.stringify(value)
  // In JSON a whole surrogate pair is written as it is, and everything that jsonb refuses is an escape.
  if (!json.includes('\\u')) return value as Json
  return JSON.parse(json.replace(ESCAPES, escape => isUnstorable(escape) ? '\\ufffd' : escape)) as Json
}

function toState ({ state, startAfter }: JobWithMetadata<unknown>, attempt: number): JobState {
  switch (state) {
    case 'active': return 'running'
    case 'completed': return 'succeeded'
    case 'failed': return 'failed'
    // Somebody has cancelled the job in pg-boss.
    case 'cancelled': return 'abandoned'
    default: return attempt > 0 ? 'retrying' : new Date(startAfter).getTime() > Date.now() ? 'delayed' : 'pending'
  }
}

/** The error that was stored with a verdict, or pg-boss's own, which pg-boss wraps when it has ended a job by itself. */
function toError (output: unknown): JobError {
  return readJobError(isObject(output) && isObject(output['value']) ? output['value'] : output, 'its process was lost')
}
