/** Jobs as pg-boss stores them. */
import type { JobInsert, JobWithMetadata } from 'pg-boss'
import type { Delivery, Job, JobError, JobRecord, JobState, Json } from '../engine.js'

/** What a queue hands out. */
export interface FetchedJob {
  readonly id: string
  readonly data: unknown
  /** Starts before this one. */
  readonly retryCount: number
}

export function toInsert ({ id, payload, delayMs, enqueuedAt, headers, requestId }: Job): JobInsert {
  return {
    id,
    data: {
      payload,
      enqueuedAt,
      ...(Object.keys(headers).length > 0 && { headers }),
      ...(requestId !== undefined && { requestId })
    },
    // Counted from the server's clock.
    ...(delayMs > 0 && { startAfter: `${Math.ceil(delayMs)} milliseconds` })
  }
}

/** Someone else may have written it: what is not of our shape is the payload itself. */
export function toDelivery (task: string, { id, data, retryCount }: FetchedJob): Delivery {
  const known = isObject(data) && Object.hasOwn(data, 'payload') ? data : { payload: data }
  const { payload, enqueuedAt, headers, requestId } = known as Record<string, unknown>
  return {
    id,
    task,
    payload,
    attempt: retryCount + 1,
    enqueuedAt: typeof enqueuedAt === 'number' && Number.isFinite(enqueuedAt) ? enqueuedAt : undefined,
    headers: isObject(headers)
      ? Object.fromEntries(Object.entries(headers).filter((entry): entry is [string, string] => typeof entry[1] === 'string'))
      : {},
    requestId: typeof requestId === 'string' ? requestId : undefined
  }
}

export function toRecord (task: string, job: JobWithMetadata<unknown>): JobRecord {
  // A job that was given back has no start of its own.
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
    enqueuedAt: toIso(toDelivery(task, job).enqueuedAt) ?? toIso(job.createdOn) ?? new Date(0).toISOString(),
    ...(started !== undefined && { startedAt: started }),
    ...(finished !== undefined && { finishedAt: finished }),
    ...((state === 'failed' || state === 'retrying') && { error: toError(output) }),
    ...(state === 'succeeded' && { result: output as Json })
  }
}

const ESCAPES = /\\(?:u0000|ud[89a-f][0-9a-f]{2}|.)/g
const isUnstorable = (escape: string): boolean => escape.length > 2

/** Whether jsonb takes it: it takes no U+0000 and no half of a surrogate pair. */
export function isStorable (value: unknown): boolean {
  return !JSON.stringify(value).match(ESCAPES)?.some(isUnstorable)
}

/** JSON that jsonb takes: what it does not becomes U+FFFD. */
export function storable (value: Json | JobError): Json {
  const json = JSON.stringify(value)
  // Serialised, whole surrogate pairs stand as they are and everything else that is refused is an escape.
  if (!json.includes('\\u')) return value as Json
  return JSON.parse(json.replace(ESCAPES, escape => isUnstorable(escape) ? '\\ufffd' : escape)) as Json
}

function toState ({ state, startAfter }: JobWithMetadata<unknown>, attempt: number): JobState {
  switch (state) {
    case 'active': return 'running'
    case 'completed': return 'succeeded'
    case 'failed': return 'failed'
    // By hand, in pg-boss.
    case 'cancelled': return 'abandoned'
    default: return attempt > 0 ? 'retrying' : new Date(startAfter).getTime() > Date.now() ? 'delayed' : 'pending'
  }
}

/** The error that was stored with a verdict, or pg-boss's own, which it wraps when it ended a job by itself. */
function toError (output: unknown): JobError {
  const inner = isObject(output) && isObject(output.value) ? output.value : output
  const { name, message, code } = isObject(inner) ? inner : { message: undefined, name: undefined, code: undefined }
  return {
    name: typeof name === 'string' ? name : 'Error',
    message: typeof message === 'string' ? message : 'its process was lost',
    ...(typeof code === 'string' && { code })
  }
}

function toIso (time: unknown): string | undefined {
  if (time === null || time === undefined) return undefined
  const date = new Date(time as Date | string | number)
  return Number.isNaN(date.getTime()) ? undefined : date.toISOString()
}

function isObject (value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}
