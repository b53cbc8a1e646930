/** Reads the records of tasks from their jobs in Redis. */
import type { JobRecord, JobState, Json } from '../engine.js'
import { isObject, readJobError, toIso } from '../stored-task.js'
import { endedAttempts, lastAttempt, lastError, numberedFrom, parse, type Counts } from './attempts.js'
import type { Client } from './connection.js'
import { skippedKey, type KnownTask } from './jobs.js'

/** The fields of a job's hash that a record is made of. */
const FIELDS = ['timestamp', 'processedOn', 'finishedOn', 'atm', 'stc', 'ats', 'failedReason', 'stacktrace', 'returnvalue'] as const
/** Jobs that one call of the script reads, so that Redis is not kept from other work. */
const CHUNK = 100

// This is a script and no transaction, because a server whose memory is full refuses transactions.
// BullMQ's own keys, such as its list "wait", look like those of jobs.
const READ = `local fields = tonumber(ARGV[1])
local found = {}
for i = fields + 2, #ARGV do
  local id = ARGV[i]
  local job = KEYS[6] .. id
  if redis.call('TYPE', job).ok ~= 'hash' then
    found[#found + 1] = false
  else
    found[#found + 1] = {
      redis.call('HMGET', job, unpack(ARGV, 2, fields + 1)),
      redis.call('ZSCORE', KEYS[1], id),
      redis.call('ZSCORE', KEYS[2], id),
      redis.call('ZSCORE', KEYS[3], id),
      redis.call('LPOS', KEYS[4], id),
      redis.call('ZSCORE', KEYS[5], id)
    }
  end
end
return found`

/** A job as it was read. */
export interface ReadJob {
  readonly record: JobRecord
  /** BullMQ's counts of the job. */
  readonly counts: Counts
  /** How often an attempt of the job has started, BullMQ's `ats`. */
  readonly starts: number
}

/**
 * Reads jobs, each at one moment, in one round trip for each hundred. BullMQ's own `getState` searches the whole list of waiting jobs. Here a job that is
 * found nowhere else is waiting.
 * @returns them in the order of the ids; undefined where there is no record
 */
export async function readJobs (redis: Client, known: KnownTask, ids: readonly string[], hasPayload = false): Promise<Array<ReadJob | undefined>> {
  const { queue } = known
  const keys = [...['completed', 'failed', 'delayed', 'active'].map(type => queue.toKey(type)), skippedKey(queue), queue.toKey('')]
  const fields = hasPayload ? [...FIELDS, 'data'] : FIELDS
  const chunks = Array.from({ length: Math.ceil(ids.length / CHUNK) }, (_, i) => ids.slice(i * CHUNK, (i + 1) * CHUNK))
  const replies = await Promise.all(chunks.map(async chunk => await redis.eval(READ, keys.length, ...keys, fields.length, ...fields, ...chunk) as unknown[]))
  return replies.flat(1).map((reply, i) => reply === null ? undefined : toJob(known, ids[i] as string, reply, hasPayload))
}

/** The score of an ended job is the time of its end. BullMQ itself removes the job only when another job of the queue ends. */
export function isExpired (endedAt: unknown, keepSeconds: number): boolean {
  return typeof endedAt === 'string' && Number(endedAt) <= Date.now() - keepSeconds * 1000
}

function toJob ({ spec: { name, keep, attempts } }: KnownTask, id: string, reply: unknown, hasPayload: boolean): ReadJob | undefined {
  // The script has this shape.
  const [values, succeededAt, failedAt, dueAt, position, skippedAt] = reply as [Array<string | null>, ...Array<string | number | null>]
  const [timestamp, processedOn, finishedOn, atm, stc, ats, failedReason, stacktrace, returnvalue, data] = values
  if (timestamp === null || timestamp === undefined) return undefined
  if (isExpired(succeededAt, keep.succeeded) || isExpired(failedAt, keep.failed)) return undefined

  const stacks = parse(stacktrace)
  const counts = { made: Number(atm ?? 0), stalled: Number(stc ?? 0) }
  const isSkipped = failedAt !== null && skippedAt === failedAt
  // The attempt that has ended the job was numbered before it was counted. A cancelled job was ended by no attempt.
  const isCounted = (succeededAt !== null || failedAt !== null) && !isSkipped
  const from = numberedFrom(stacks, isCounted ? { ...counts, made: counts.made - 1 } : counts, typeof failedReason === 'string')
  const ended = endedAttempts(counts, from)
  const state = isSkipped ? 'skipped' : stateOf({ succeeded: succeededAt !== null, failed: failedAt !== null, delayed: dueAt !== null, running: position !== null }, ended)
  const [startedAt, finishedAt] = [isoOf(processedOn), isoOf(finishedOn)]
  const record: JobRecord = {
    id,
    name,
    state,
    // The attempt that tells that none is left is not one more.
    attempt: Math.min(attempts, state === 'failed' || state === 'skipped' ? lastAttempt(stacks) ?? ended : state === 'running' ? ended + 1 : ended),
    enqueuedAt: isoOf(timestamp) ?? new Date(0).toISOString(),
    ...(startedAt !== undefined && { startedAt }),
    ...(finishedAt !== undefined && { finishedAt }),
    ...((state === 'failed' || state === 'retrying') && { error: readJobError(lastError(stacks), failedReason ?? '') }),
    ...(state === 'succeeded' && { result: parse(returnvalue) as Json }),
    ...(hasPayload && { payload: payloadOf(data) })
  }
  return { record, counts, starts: Number(ats ?? 0) }
}

/** The payload as it is delivered: data without a `payload` is the payload itself, and data that is no JSON is a text. */
function payloadOf (data: string | null | undefined): unknown {
  const found = parse(data)
  if (found === null && data !== 'null') return data ?? null
  return isObject(found) && Object.hasOwn(found, 'payload') ? found['payload'] : found
}

function stateOf (found: Record<'succeeded' | 'failed' | 'delayed' | 'running', boolean>, ended: number): JobState {
  if (found.succeeded) return 'succeeded'
  if (found.failed) return 'failed'
  if (found.running) return 'running'
  if (found.delayed) return ended === 0 ? 'delayed' : 'retrying'
  return 'pending'
}

/** Redis stores numbers as text. */
function isoOf (milliseconds: string | null | undefined): string | undefined {
  return milliseconds ? toIso(Number(milliseconds)) : undefined
}
