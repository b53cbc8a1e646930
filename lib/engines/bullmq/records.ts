/** How a task is kept in BullMQ: what its job carries, how the error of an attempt is stored, and how a record is read. */
import { Job as BullJob, type JobJson, type JobsOptions, type Queue } from 'bullmq'
import type { Redis } from 'ioredis'
import type { Delivery, Job, JobError, JobRecord, JobState, Json, TaskSpec } from '../engine.js'

/**
 * The data of a job. Anybody may write one: `queue.add('send-email', { payload: { to: 'jane@example.com' } })`, with the
 * queue and the job named like the definition. Data without a `payload` is taken for the payload itself.
 */
export interface StoredTask {
  readonly payload: Json
  /** Trace context, and what a subscriber of the `enqueue` channel added. */
  readonly headers?: Readonly<Record<string, string>>
  /** Of the request that enqueued it. */
  readonly requestId?: string
}

/** A queue of one definition. */
export type TaskQueue = Queue<StoredTask, Json, string>

/** A job whose data is JSON already: BullMQ would make it once more, of what it was parsed to. */
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

  constructor ({ text, headers, requestId }: Job) {
    const traced = Object.keys(headers).length === 0 ? '' : `,"headers":${JSON.stringify(headers)}`
    const requested = requestId === undefined ? '' : `,"requestId":${JSON.stringify(requestId)}`
    this.text = `{"payload":${text}${traced}${requested}}`
  }

  /** Should a later BullMQ make JSON of a job in another way, it is the same. */
  toJSON (): unknown {
    return JSON.parse(this.text)
  }
}

/** How long it is kept is the worker's word, so that jobs written by hand are kept as long. */
export function toJobOptions ({ id, delayMs, enqueuedAt }: Job): JobsOptions {
  if (delayMs <= 0) return { jobId: id, timestamp: enqueuedAt }
  // BullMQ counts a delay from the timestamp.
  return { jobId: id, timestamp: enqueuedAt, delay: Math.max(1, Math.ceil(Date.now() + delayMs - enqueuedAt)) }
}

export function toDelivery (task: string, job: BullJob<unknown>): Delivery {
  const { data } = job
  const stored: Record<string, unknown> = isObject(data) && 'payload' in data ? data : { payload: data }
  const { payload, headers, requestId } = stored
  return {
    id: job.id ?? '',
    task,
    payload,
    attempt: startsBefore(job.attemptsMade, job.stalledCounter) + 1,
    enqueuedAt: job.timestamp,
    headers: isTextRecord(headers) ? headers : {},
    requestId: typeof requestId === 'string' ? requestId : undefined
  }
}

/**
 * Starts that have ended. `attemptsMade` rises with every verdict but `released`, `stalledCounter` with every start whose
 * process died: `attemptsStarted` counts what was released too.
 */
function startsBefore (attemptsMade: number, stalledCounter: number): number {
  return attemptsMade + stalledCounter
}

/**
 * The error of an attempt, as BullMQ takes it: `failedReason` is its message, for people and dashboards; what it keeps as
 * the stack is the error itself as JSON, for `get`.
 */
export class AttemptFailed extends Error {
  override readonly name = 'AttemptFailed'

  constructor (error: JobError) {
    // Never the bare message: BullMQ takes one that says `bullmq:rateLimitExceeded` for an order.
    super(`${error.name}: ${error.message}`)
    this.stack = JSON.stringify(error)
  }
}

/** What a record is made of in a job's hash: not the payload. */
const FIELDS = ['timestamp', 'processedOn', 'finishedOn', 'atm', 'stc', 'failedReason', 'stacktrace', 'returnvalue'] as const

// A script, and no transaction: a server whose memory is full refuses those.
const READ = `return {
  redis.call('HMGET', KEYS[1], unpack(ARGV, 2)),
  redis.call('ZSCORE', KEYS[2], ARGV[1]),
  redis.call('ZSCORE', KEYS[3], ARGV[1]),
  redis.call('ZSCORE', KEYS[4], ARGV[1]),
  redis.call('LPOS', KEYS[5], ARGV[1])
}`

/**
 * Reads a record at one moment, in one round trip. BullMQ's own `getState` searches the whole list of waiting jobs; here
 * what is found nowhere else is waiting.
 */
export async function readRecord (redis: Redis, queue: TaskQueue, { name, keep }: TaskSpec, id: string): Promise<JobRecord | undefined> {
  const keys = [id, 'completed', 'failed', 'delayed', 'active'].map(type => queue.toKey(type))
  const reply = await redis.eval(READ, keys.length, ...keys, id, ...FIELDS)
  // The shape is that of the script.
  const [values, succeededAt, failedAt, dueAt, position] = reply as [Array<string | null>, ...Array<string | number | null>]
  const [timestamp, processedOn, finishedOn, atm, stc, failedReason, stacktrace, returnvalue] = values
  if (timestamp === null || timestamp === undefined) return undefined
  if (isExpired(succeededAt, keep.succeeded) || isExpired(failedAt, keep.failed)) return undefined

  const ended = startsBefore(Number(atm ?? 0), Number(stc ?? 0))
  const state = stateOf({ succeeded: succeededAt !== null, failed: failedAt !== null, delayed: dueAt !== null, running: position !== null }, ended)
  return {
    id,
    name,
    state,
    attempt: state === 'running' ? ended + 1 : ended,
    enqueuedAt: toISO(timestamp),
    ...(processedOn && { startedAt: toISO(processedOn) }),
    ...(finishedOn && { finishedAt: toISO(finishedOn) }),
    ...((state === 'failed' || state === 'retrying') && { error: toJobError(stacktrace, failedReason) }),
    ...(state === 'succeeded' && { result: fromJson(returnvalue) as Json })
  }
}

/** The score of an ended job is the time of its end. BullMQ itself removes it only when another job of the queue ends. */
export function isExpired (endedAt: unknown, keepSeconds: number): boolean {
  return typeof endedAt === 'string' && Number(endedAt) <= Date.now() - keepSeconds * 1000
}

function stateOf (found: Record<'succeeded' | 'failed' | 'delayed' | 'running', boolean>, ended: number): JobState {
  if (found.succeeded) return 'succeeded'
  if (found.failed) return 'failed'
  if (found.running) return 'running'
  if (found.delayed) return ended === 0 ? 'delayed' : 'retrying'
  return 'pending'
}

function toJobError (stacktrace: string | null | undefined, failedReason: string | null | undefined): JobError {
  const stacks = fromJson(stacktrace)
  const stored = Array.isArray(stacks) ? fromJson(stacks.at(-1)) : undefined
  // Someone else's worker stores a stack there.
  if (!isObject(stored) || typeof stored.message !== 'string') return { name: 'Error', message: failedReason ?? '' }
  const { name, message, code } = stored
  return { name: String(name), message, ...(typeof code === 'string' && { code }) }
}

function fromJson (text: unknown): unknown {
  if (typeof text !== 'string') return null
  try {
    return JSON.parse(text)
  } catch {
    return null
  }
}

function toISO (milliseconds: string): string {
  return new Date(Number(milliseconds)).toISOString()
}

function isObject (value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null
}

function isTextRecord (value: unknown): value is Record<string, string> {
  return isObject(value) && Object.values(value).every(text => typeof text === 'string')
}
