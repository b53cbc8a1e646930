/** Reads the record of a task from its job in Redis. */
import type { JobRecord, JobState, Json, TaskSpec } from '../engine.js'
import { readJobError, toIso } from '../stored-task.js'
import { endedAttempts, lastAttempt, lastError, numberedFrom, parse } from './attempts.js'
import type { Client } from './connection.js'
import type { TaskQueue } from './jobs.js'

/** The fields of a job's hash that a record is made of. The payload is not one of them. */
const FIELDS = ['timestamp', 'processedOn', 'finishedOn', 'atm', 'stc', 'failedReason', 'stacktrace', 'returnvalue'] as const

// This is a script and no transaction, because a server whose memory is full refuses transactions.
// BullMQ's own keys, such as its list "wait", look like those of jobs.
const READ = `if redis.call('TYPE', KEYS[1]).ok ~= 'hash' then return false end
return {
  redis.call('HMGET', KEYS[1], unpack(ARGV, 2)),
  redis.call('ZSCORE', KEYS[2], ARGV[1]),
  redis.call('ZSCORE', KEYS[3], ARGV[1]),
  redis.call('ZSCORE', KEYS[4], ARGV[1]),
  redis.call('LPOS', KEYS[5], ARGV[1])
}`

/**
 * Reads a record at one moment, in one round trip. BullMQ's own `getState` searches the whole list of waiting jobs. Here a job that is
 * found nowhere else is waiting.
 */
export async function readRecord (redis: Client, queue: TaskQueue, { name, keep, attempts }: TaskSpec, id: string): Promise<JobRecord | undefined> {
  const keys = [id, 'completed', 'failed', 'delayed', 'active'].map(type => queue.toKey(type))
  const reply = await redis.eval(READ, keys.length, ...keys, id, ...FIELDS)
  if (reply === null) return undefined
  // The script has this shape.
  const [values, succeededAt, failedAt, dueAt, position] = reply as [Array<string | null>, ...Array<string | number | null>]
  const [timestamp, processedOn, finishedOn, atm, stc, failedReason, stacktrace, returnvalue] = values
  if (timestamp === null || timestamp === undefined) return undefined
  if (isExpired(succeededAt, keep.succeeded) || isExpired(failedAt, keep.failed)) return undefined

  const stacks = parse(stacktrace)
  const counts = { made: Number(atm ?? 0), stalled: Number(stc ?? 0) }
  // The attempt that has ended the job was numbered before it was counted.
  const hasEnded = succeededAt !== null || failedAt !== null
  const from = numberedFrom(stacks, hasEnded ? { ...counts, made: counts.made - 1 } : counts, typeof failedReason === 'string')
  const ended = endedAttempts(counts, from)
  const state = stateOf({ succeeded: succeededAt !== null, failed: failedAt !== null, delayed: dueAt !== null, running: position !== null }, ended)
  const [startedAt, finishedAt] = [isoOf(processedOn), isoOf(finishedOn)]
  return {
    id,
    name,
    state,
    // The attempt that tells that none is left is not one more.
    attempt: Math.min(attempts, state === 'failed' ? lastAttempt(stacks) ?? ended : state === 'running' ? ended + 1 : ended),
    enqueuedAt: isoOf(timestamp) ?? new Date(0).toISOString(),
    ...(startedAt !== undefined && { startedAt }),
    ...(finishedAt !== undefined && { finishedAt }),
    ...((state === 'failed' || state === 'retrying') && { error: readJobError(lastError(stacks), failedReason ?? '') }),
    ...(state === 'succeeded' && { result: parse(returnvalue) as Json })
  }
}

/** The score of an ended job is the time of its end. BullMQ itself removes the job only when another job of the queue ends. */
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

/** Redis stores numbers as text. */
function isoOf (milliseconds: string | null | undefined): string | undefined {
  return milliseconds ? toIso(Number(milliseconds)) : undefined
}
