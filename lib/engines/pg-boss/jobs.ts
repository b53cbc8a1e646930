/** Tasks as jobs of pg-boss: what is stored, and how a job and its record are read. */
import type { JobInsert, JobWithMetadata } from 'pg-boss'
import { readOr } from '../../foreign.js'
import type { Delivery, Job, JobError, JobRecord, JobState, Json } from '../engine.js'
import { enqueuedAtOf, isObject, readJobError, type StoredTask, timeOf, toDelivery as readDelivery, toIso, toStored, toStoredText } from '../stored-task.js'
import { RETRY_LIMIT } from './texts.js'
import { fromOutput, inKeyOrder, isStorable, keyOrder, MARK, parse } from './values.js'

/** A job as a queue hands it out. */
export interface FetchedJob {
  readonly id: string
  readonly data: unknown
  /** Attempts before this one. */
  readonly retryCount: number
  /** The mark of this start, see `fetchAnew`. */
  readonly expireInSeconds: number
}

/** What a record is made of. */
export type StoredJob = Pick<JobWithMetadata<unknown>, 'id' | 'state' | 'retryCount' | 'retryLimit' | 'startAfter' | 'startedOn' | 'completedOn' | 'createdOn' | 'output'>

/** Milliseconds: 30,000 years. Postgres knows times of a little more than that. */
const MAX_DELAY_MS = 1e15

export function toInsert (job: Job): JobInsert {
  const { id, delayMs, enqueuedAt } = job
  const data = toData(job)
  data.enqueuedAt = enqueuedAt
  // An interval is counted by the server's clock.
  return delayMs > 0 ? { id, data, startAfter: `${boundedDelay(delayMs)} milliseconds` } : { id, data }
}

/** Milliseconds that Postgres can add to any time. */
export function boundedDelay (ms: number): number {
  return Math.min(Math.ceil(ms), MAX_DELAY_MS)
}

export function toDelivery (task: string, { id, data, retryCount }: FetchedJob): Delivery {
  return readDelivery(task, id, retryCount + 1, fromData(data))
}

/** A stored task as the data of a job: with the order of the keys of its payload where `jsonb` would change it, or as one text. */
interface Data extends Partial<StoredTask> {
  keys?: string
  [MARK]?: string
}

function toData (job: Job): Data {
  const text = toStoredText(job)
  if (!isStorable(text)) return { [MARK]: text }
  return readOr<Data>({ [MARK]: text }, () => {
    const data: Data = toStored(job)
    const order = keyOrder(data.payload as Json)
    if (order !== undefined) data.keys = order
    return data
  })
}

/** The stored form of a task in the data of a job, whoever wrote it. */
function fromData (data: unknown): unknown {
  if (!isObject(data)) return data
  const { [MARK]: mark, payload, keys, headers, requestId, context, enqueuedAt } = data
  if (payload !== undefined) return typeof keys === 'string' ? { payload: inKeyOrder(payload, keys), headers, requestId, context, enqueuedAt } : data
  if (typeof mark !== 'string') return data
  const stored = parse(mark)
  if (!isObject(stored)) return data
  stored['enqueuedAt'] = enqueuedAt
  return stored
}

/**
 * When a task was added, in milliseconds since the epoch, and at the latest when it was stored: the clock of an app may be ahead of the server's,
 * and other programs store what they like. `ADDED_AT` says the same to the server.
 */
export function addedAt (data: unknown, createdOn: unknown): number {
  const stored = new Date(createdOn as Date).getTime()
  const added = isObject(data) && typeof data[MARK] === 'string' ? timeOf(data['enqueuedAt']) : enqueuedAtOf(data)
  return Math.min(added ?? stored, stored)
}

/**
 * @param attempts the most attempts of the definition. A job whose process died at the last one is handed out once more, to be failed
 * @param added when the task was added, in milliseconds since the epoch
 */
export function toRecord (task: string, attempts: number, job: StoredJob, added: number, now = Date.now()): JobRecord {
  const isPutBack = job.state === 'created' || (job.state === 'retry' && job.retryLimit > RETRY_LIMIT)
  // An attempt that was returned to the engine leaves no start.
  const started = isPutBack ? undefined : toIso(job.startedOn)
  const attempt = isPutBack ? 0 : Math.min(job.retryCount + (started === undefined ? 0 : 1), attempts)
  const state = toState(job, attempt, now)
  const finished = state === 'succeeded' || state === 'failed' || state === 'skipped' ? toIso(job.completedOn) : undefined
  // Drivers differ in what they make of a JSON column.
  const output = fromOutput(job.output)
  return {
    id: job.id,
    name: task,
    state,
    attempt,
    enqueuedAt: toIso(added) ?? new Date(0).toISOString(),
    ...(started !== undefined && { startedAt: started }),
    ...(finished !== undefined && { finishedAt: finished }),
    ...((state === 'failed' || state === 'retrying') && { error: toError(output) }),
    ...(state === 'succeeded' && { result: output as Json })
  }
}

/** The payload of a job, whoever wrote it. */
export function payloadOf (task: string, id: string, data: unknown): unknown {
  return readDelivery(task, id, 1, fromData(data)).payload
}

function toState ({ state, startAfter }: StoredJob, attempt: number, now: number): JobState {
  switch (state) {
    case 'active': return 'running'
    case 'completed': return 'succeeded'
    case 'failed': return 'failed'
    case 'cancelled': return 'skipped'
    default: return attempt > 0 ? 'retrying' : new Date(startAfter).getTime() > now ? 'delayed' : 'pending'
  }
}

/** The error that was stored with a verdict, or pg-boss's own, which pg-boss wraps when it has ended a job by itself. */
function toError (output: unknown): JobError {
  return readJobError(isObject(output) && isObject(output['value']) ? output['value'] : output, 'its process was lost')
}
