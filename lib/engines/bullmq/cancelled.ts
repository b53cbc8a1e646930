/**
 * Cancelled jobs. BullMQ cancels a job only in the process that runs it, and keeps no record of it. So a script moves the job to BullMQ's set `failed`, whatever
 * state it was in, and takes the lock of one that runs. Nobody starts it again: it is no longer among the jobs that wait or run. The worker that ran it notices
 * that the lock is gone when it renews the lock, or tells its verdict, which then has no effect.
 */
import type { JobState } from '../engine.js'
import { AttemptFailed } from './attempts.js'
import type { Client } from './connection.js'
import { skippedKey, type KnownTask, type TaskQueue } from './jobs.js'
import { readJobs } from './records.js'

/** The field of a job's hash that says which of its starts was cancelled last. Each start after it is not cancelled. */
const MARK = 'fbtCancelled'
/** Seconds for which a cancelled job is remembered, although its record is not kept, so that its worker hears of it. */
const LEAST_KEPT = 60
/** How often a job that changes meanwhile is looked at. */
const MAX_LOOKS = 20
/** What dashboards show as the reason. */
const REASON = { name: 'FastifyError', message: 'It was cancelled', code: 'FST_BGT_CANCELLED' } as const

const ENDED: readonly JobState[] = ['succeeded', 'failed', 'skipped']

const NONE = 0
const CANCELLED = 1
const HAS_PARENT = 2

/** The types of keys in which a job waits. */
export const WAITING_LISTS = ['wait', 'paused'] as const
export const WAITING_SETS = ['prioritized', 'waiting-children'] as const

// BullMQ's own script for jobs that have ended refuses a job that does not run. The next job of a job scheduler stays, because the schedule would end with it: BullMQ
// does not remove it either.
const CANCEL = `local job, id = KEYS[1], ARGV[1]
if redis.call('TYPE', job).ok ~= 'hash' then return ${NONE} end
local found = redis.call('HMGET', job, 'atm', 'stc', 'ats', 'parentKey', 'rjk')
for i = 1, 3 do
  if (tonumber(found[i]) or 0) ~= tonumber(ARGV[i + 1]) then return -1 end
end
if found[5] and not redis.call('LPOS', KEYS[3], id) then return ${NONE} end
local from
if redis.call('ZREM', KEYS[2], id) == 1 then from = 'delayed'
elseif redis.call('LREM', KEYS[3], 1, id) > 0 then from = 'active'
elseif redis.call('LREM', KEYS[4], -1, id) > 0 or redis.call('LREM', KEYS[5], -1, id) > 0 then from = 'waiting'
elseif redis.call('ZREM', KEYS[6], id) == 1 then from = 'prioritized'
elseif redis.call('ZREM', KEYS[7], id) == 1 then from = 'waiting-children'
else return ${NONE} end
local now, kept = tonumber(ARGV[5]), tonumber(ARGV[6])
redis.call('DEL', job .. ':lock')
redis.call('SREM', KEYS[8], id)
redis.call('HSET', job, 'finishedOn', now, 'failedReason', ARGV[7], 'stacktrace', ARGV[8], '${MARK}', ARGV[4])
redis.call('HDEL', job, 'returnvalue', 'defa')
redis.call('ZADD', KEYS[9], now, id)
redis.call('ZREMRANGEBYSCORE', KEYS[10], '-inf', now - kept)
redis.call('ZADD', KEYS[10], now, id)
redis.call('PEXPIRE', KEYS[10], kept)
redis.call('XADD', KEYS[11], 'MAXLEN', '~', redis.call('HGET', KEYS[12], 'opts.maxLenEvents') or 10000, '*', 'event', 'failed', 'jobId', id, 'failedReason', ARGV[7], 'prev', from)
local deduplicated = redis.call('HGET', job, 'deid')
if deduplicated and redis.call('GET', KEYS[13] .. ':' .. deduplicated) == id then redis.call('DEL', KEYS[13] .. ':' .. deduplicated) end
return found[4] and ${HAS_PARENT} or ${CANCELLED}`
const CANCEL_KEYS = ['delayed', 'active', ...WAITING_LISTS, ...WAITING_SETS, 'stalled', 'failed'] as const

// The job stays among the cancelled ones: its worker may ask before the key is stored again.
const FREE = `local id = ARGV[1]
local failedAt = redis.call('ZSCORE', KEYS[2], id)
if not failedAt or failedAt ~= redis.call('ZSCORE', KEYS[3], id) then return end
redis.call('ZREM', KEYS[2], id)
for _, type in ipairs({ '', ':logs', ':dependencies', ':processed', ':failed', ':unsuccessful' }) do redis.call('DEL', KEYS[1] .. type) end`

const ARE_CANCELLED = `local cancelled = {}
for i = 1, #ARGV, 3 do
  local found = redis.call('HMGET', KEYS[1] .. ARGV[i], 'timestamp', '${MARK}')
  local timestamp = tonumber(found[1])
  local isOther = timestamp and timestamp == math.floor(timestamp) and timestamp ~= tonumber(ARGV[i + 1])
  local isMarked = found[2] and tonumber(found[2]) >= tonumber(ARGV[i + 2])
  local isRemoved = not found[1] and redis.call('ZSCORE', KEYS[2], ARGV[i])
  cancelled[#cancelled + 1] = (isOther or isMarked or isRemoved) and 1 or 0
end
return cancelled`

/** Cancels a job. @returns whether it had not ended */
export async function cancelJob (redis: Client, known: KnownTask, id: string): Promise<boolean> {
  const { spec: { keep }, queue } = known
  const keys = [...[id, ...CANCEL_KEYS].map(type => queue.toKey(type)), skippedKey(queue), ...['events', 'meta', 'de'].map(type => queue.toKey(type))]
  for (let looks = 0; looks < MAX_LOOKS; looks++) {
    const [job] = await readJobs(redis, known, [id])
    if (job === undefined || ENDED.includes(job.record.state)) return false
    const { record: { attempt }, counts: { made, stalled }, starts } = job
    // Who puts it back gives it all its attempts.
    const { message, stack } = new AttemptFailed(REASON, { attempt, made, from: [made, stalled] })
    const reply = await redis.eval(CANCEL, keys.length, ...keys,
      id, made, stalled, starts, Date.now(), Math.max(keep.failed, LEAST_KEPT) * 1000, message, JSON.stringify([stack]))
    // BullMQ lets the parent, of a job that another program has added, wait for this one no longer.
    if (reply === HAS_PARENT) await (await queue.getJob(id))?.removeChildDependency().catch(() => {})
    if (reply === CANCELLED || reply === HAS_PARENT) return true
    if (reply === NONE) return false
  }
  return false
}

/** Removes the record of a cancelled job, so that its key is free. A job that was put back, or stored again, stays. */
export async function removeCancelled (redis: Client, queue: TaskQueue, id: string): Promise<void> {
  await redis.eval(FREE, 3, queue.toKey(id), queue.toKey('failed'), skippedKey(queue), id)
}

/** An attempt of a job that has lost its lock. */
export interface LostAttempt {
  readonly id?: string | undefined
  readonly timestamp: number
  readonly attemptsStarted: number
}

/** Tells of each of these attempts whether it was cancelled. Otherwise its lock has run out. */
export async function areCancelled (redis: Client, baseKey: string, skipped: string, attempts: readonly LostAttempt[]): Promise<boolean[]> {
  const values = attempts.flatMap(({ id = '', timestamp, attemptsStarted }) => [id, timestamp, attemptsStarted])
  const replies = await redis.eval(ARE_CANCELLED, 2, baseKey, skipped, ...values) as number[]
  return replies.map(reply => reply === 1)
}
