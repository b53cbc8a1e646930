/** Reads the record of a task from its job in Redis. */
import type { Redis } from 'ioredis'
import type { JobError, JobRecord, JobState, Json, TaskSpec } from '../engine.js'
import { readJobError, toIso } from '../stored-task.js'
import { endedAttempts, type TaskQueue } from './jobs.js'

/** The fields of a job's hash that a record is made of. The payload is not one of them. */
const FIELDS = ['timestamp', 'processedOn', 'finishedOn', 'atm', 'stc', 'failedReason', 'stacktrace', 'returnvalue'] as const

// This is a script and no transaction, because a server whose memory is full refuses transactions.
const READ = `return {
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
export async function readRecord (redis: Redis, queue: TaskQueue, { name, keep }: TaskSpec, id: string): Promise<JobRecord | undefined> {
  const keys = [id, 'completed', 'failed', 'delayed', 'active'].map(type => queue.toKey(type))
  const reply = await redis.eval(READ, keys.length, ...keys, id, ...FIELDS)
  // The script has this shape.
  const [values, succeededAt, failedAt, dueAt, position] = reply as [Array<string | null>, ...Array<string | number | null>]
  const [timestamp, processedOn, finishedOn, atm, stc, failedReason, stacktrace, returnvalue] = values
  if (timestamp === null || timestamp === undefined) return undefined
  if (isExpired(succeededAt, keep.succeeded) || isExpired(failedAt, keep.failed)) return undefined

  const ended = endedAttempts(Number(atm ?? 0), Number(stc ?? 0))
  const state = stateOf({ succeeded: succeededAt !== null, failed: failedAt !== null, delayed: dueAt !== null, running: position !== null }, ended)
  const [startedAt, finishedAt] = [isoOf(processedOn), isoOf(finishedOn)]
  return {
    id,
    name,
    state,
    attempt: state === 'running' ? ended + 1 : ended,
    enqueuedAt: isoOf(timestamp) ?? new Date(0).toISOString(),
    ...(startedAt !== undefined && { startedAt }),
    ...(finishedAt !== undefined && { finishedAt }),
    ...((state === 'failed' || state === 'retrying') && { error: errorOf(stacktrace, failedReason) }),
    ...(state === 'succeeded' && { result: fromJson(returnvalue) as Json })
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

/** The worker of another program stores stacks, where a worker of this package stores the error as JSON. */
function errorOf (stacktrace: string | null | undefined, failedReason: string | null | undefined): JobError {
  const stacks = fromJson(stacktrace)
  return readJobError(Array.isArray(stacks) ? fromJson(stacks.at(-1)) : undefined, failedReason ?? '')
}

function fromJson (text: unknown): unknown {
  if (typeof text !== 'string') return null
  try {
    return JSON.parse(text)
  } catch {
    return null
  }
}

/** Redis stores numbers as text. */
function isoOf (milliseconds: string | null | undefined): string | undefined {
  return milliseconds ? toIso(Number(milliseconds)) : undefined
}
