/**
 * The order of many failed jobs. BullMQ keeps them by the time of their end, and the pages of `find` go by the time when they were added. Where jobs have waited
 * for long, all of them have to be read to know the newest one. So the first page that would read too many stores this order, and later pages add only what
 * has failed meanwhile. The order expires when nobody has read a page for a while, so an app that reads no pages pays for nothing.
 */
import type { JobPosition } from '../engine.js'
import { ownKey, skippedKey, type KnownTask } from './jobs.js'
import type { Client } from './connection.js'

/** Jobs that one call of a script looks at, so that Redis is not kept from other work. */
const CHUNK = 1000
/** Milliseconds for which the order is kept after the last page. */
const KEPT_MS = 600_000
/** Milliseconds by which the ends of jobs may be stored in another order: workers tell them later, and their clocks differ. */
const OVERLAP_MS = 3_000

const BEGIN = `local to, count = unpack(redis.call('HMGET', KEYS[2], 'to', 'count'))
local from = '-inf'
if to and redis.call('EXISTS', KEYS[3]) == 1 and redis.call('ZCOUNT', KEYS[1], '-inf', to) <= tonumber(count) then from = '(' .. to end
return { redis.call('EXISTS', KEYS[3]), from }`

const ADD = `local found = redis.call('ZRANGEBYSCORE', KEYS[1], ARGV[1], '+inf', 'WITHSCORES', 'LIMIT', ARGV[2], ${CHUNK})
local added = {}
for i = 1, #found, 2 do
  local timestamp = redis.call('HGET', KEYS[4] .. found[i], 'timestamp')
  if timestamp then
    local time = tonumber(timestamp) or 0
    if time ~= time or math.abs(time) > 8.64e15 then time = 0 end
    added[#added + 1] = string.format('%.0f', time < 0 and math.ceil(time) or math.floor(time))
    added[#added + 1] = found[i]
  end
end
if #added > 0 then redis.call('ZADD', KEYS[3], unpack(added)) end
redis.call('PEXPIRE', KEYS[3], ${KEPT_MS})
if #found < ${2 * CHUNK} then
  redis.call('HSET', KEYS[2], 'to', ARGV[3], 'count', redis.call('ZCOUNT', KEYS[1], '-inf', ARGV[3]))
  redis.call('PEXPIRE', KEYS[2], ${KEPT_MS})
end
return { #found / 2, found[#found] or '' }`

const PAGE = `local rank, limit, kept, id, time = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
if rank < 0 then
  local own = redis.call('ZSCORE', KEYS[2], id)
  redis.call('ZADD', KEYS[2], time, id)
  rank = redis.call('ZREVRANK', KEYS[2], id)
  if not own then redis.call('ZREM', KEYS[2], id)
  else
    redis.call('ZADD', KEYS[2], own, id)
    if tonumber(own) >= tonumber(time) then rank = rank + 1 end
  end
end
local found, gone, isLast = {}, {}, 0
local jobs = redis.call('ZREVRANGE', KEYS[2], rank, rank + ${CHUNK - 1}, 'WITHSCORES')
local looked = 0
for i = 1, #jobs, 2 do
  if #found >= 2 * limit then break end
  looked = looked + 1
  local failedAt = redis.call('ZSCORE', KEYS[1], jobs[i])
  if not failedAt then gone[#gone + 1] = jobs[i]
  elseif tonumber(failedAt) > kept and failedAt ~= redis.call('ZSCORE', KEYS[3], jobs[i]) then
    found[#found + 1] = jobs[i]
    found[#found + 1] = jobs[i + 1]
  end
end
if looked * 2 == #jobs and #jobs < ${2 * CHUNK} then isLast = 1 end
if #gone > 0 then redis.call('ZREM', KEYS[2], unpack(gone)) end
return { rank + looked - #gone, isLast, found }`

/**
 * Looks for failed jobs in the stored order, which is brought up to date first.
 * @param mayStore whether the order is to be stored, if it is not
 * @returns undefined if it is not stored
 */
export async function findInOrder (redis: Client, known: KnownTask, after: JobPosition | undefined, limit: number, mayStore: boolean): Promise<{ candidates: JobPosition[], isLast: boolean } | undefined> {
  const { spec: { keep }, queue } = known
  const [failed, progress, order] = [queue.toKey('failed'), ownKey(queue, 'ordered'), ownKey(queue, 'order')]
  try {
    if (!await update(redis, [failed, progress, order, queue.toKey('')], mayStore)) return undefined
    const candidates: JobPosition[] = []
    let rank = after === undefined ? 0 : -1
    for (;;) {
      const [next, isLast, found] = await redis.eval(PAGE, 3, failed, order, skippedKey(queue),
        rank, limit - candidates.length, Date.now() - keep.failed * 1000, after?.id ?? '', after?.enqueuedAt ?? 0) as [number, number, string[]]
      for (let i = 0; i < found.length; i += 2) candidates.push({ id: found[i] as string, enqueuedAt: Number(found[i + 1]) })
      if (isLast === 1 || candidates.length >= limit) return { candidates, isLast: isLast === 1 }
      rank = next
    }
  } catch (error) {
    // A server whose memory is full still tells what it has.
    if (/\b(?:OOM|NOPERM)\b/.test((error as Error).message)) return undefined
    throw error
  }
}

/** @returns whether the order is stored */
async function update (redis: Client, keys: readonly string[], mayStore: boolean): Promise<boolean> {
  const [isStored, begin] = await redis.eval(BEGIN, keys.length, ...keys) as [number, string]
  if (isStored === 0 && !mayStore) return false
  // What has ended later is looked at again by the next page.
  const to = Date.now() - OVERLAP_MS
  let [from, offset] = [begin, 0]
  for (;;) {
    const [added, last] = await redis.eval(ADD, keys.length, ...keys, from, offset, to) as [number, string]
    if (added < CHUNK) return true
    // More jobs than a chunk may have the same time.
    if (last === from) offset += CHUNK
    else [from, offset] = [last, 0]
  }
}
