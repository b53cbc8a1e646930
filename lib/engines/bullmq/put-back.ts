/** Puts jobs back that have failed for good. */
import type { Client } from './connection.js'
import { skippedKey, type KnownTask } from './jobs.js'

const HAS_PARENT = 2

// BullMQ's own `retry` cannot tell a cancelled job from a failed one in the step that moves it. The rest of this script is what BullMQ does.
const PUT_BACK = `local job, id = KEYS[1], ARGV[1]
local failedAt = redis.call('ZSCORE', KEYS[2], id)
if not failedAt or tonumber(failedAt) <= tonumber(ARGV[2]) or failedAt == redis.call('ZSCORE', KEYS[3], id) then return 0 end
local found = redis.call('HMGET', job, 'timestamp', 'priority', 'parentKey', 'opts')
if not found[1] then return 0 end
if found[3] then return ${HAS_PARENT} end
redis.call('ZREM', KEYS[2], id)
redis.call('HDEL', job, 'finishedOn', 'processedOn', 'failedReason')
local priority = tonumber(found[2]) or 0
if priority > 0 then
  redis.call('ZADD', KEYS[5], priority * 0x100000000 + redis.call('INCR', KEYS[6]) % 0x100000000, id)
else
  redis.call(string.find(found[4] or '', '"lifo":true', 1, true) and 'RPUSH' or 'LPUSH', KEYS[4], id)
end
local meta = redis.call('HMGET', KEYS[7], 'paused', 'concurrency', 'opts.maxLenEvents')
if not meta[1] and not (meta[2] and redis.call('LLEN', KEYS[8]) >= tonumber(meta[2])) then redis.call('ZADD', KEYS[9], 0, '0') end
redis.call('XADD', KEYS[10], 'MAXLEN', '~', meta[3] or 10000, '*', 'event', 'waiting', 'jobId', id, 'prev', 'failed')
return 1`

/** Puts a job back that has failed for good. It then has all its attempts. @returns whether it had failed */
export async function putBack (redis: Client, { spec: { keep }, queue }: KnownTask, id: string): Promise<boolean> {
  const [job, failed, ...others] = [id, 'failed', 'wait', 'prioritized', 'pc', 'meta', 'active', 'marker', 'events'].map(type => queue.toKey(type)) as [string, string, ...string[]]
  const keys = [job, failed, skippedKey(queue), ...others]
  const reply = await redis.eval(PUT_BACK, keys.length, ...keys, id, Date.now() - keep.failed * 1000)
  if (reply !== HAS_PARENT) return reply === 1
  // Another program has added it together with a job that waits for it, to which only BullMQ itself can tell that it runs again.
  try {
    await (await queue.getJob(id))?.retry('failed')
    return true
  } catch (error) {
    if (typeof (error as { code?: unknown }).code === 'number') return false
    throw error
  }
}
