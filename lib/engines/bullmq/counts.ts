/** Counts jobs. */
import type { JobCounts } from '../engine.js'
import { WAITING_LISTS, WAITING_SETS } from './cancelled.js'
import type { Client } from './connection.js'
import { skippedKey, type KnownTask } from './jobs.js'

/** Jobs of which one call of a script reads the state, so that Redis is not kept from other work. */
const CHUNK = 1000

/**
 * Attempts of a job that have ended, as `numberedFrom` and `endedAttempts` count them. What numbers the attempts is the end of the last error.
 */
export const ENDED_ATTEMPTS = `local function endedAttempts (job)
  local found = redis.call('HMGET', job, 'atm', 'stc')
  local made, stalled = tonumber(found[1]) or 0, tonumber(found[2]) or 0
  if made == 0 and stalled == 0 then return 0 end
  found = redis.call('HMGET', job, 'stacktrace', 'failedReason')
  local last, from, fromStalled = string.match(string.sub(found[1] or '', -100), '\\\\"made\\\\":(%d+),\\\\"from\\\\":%[(%d+),(%d+)%]}"%]$')
  if not last then from, fromStalled = found[2] and 0 or made, 0
  elseif made > tonumber(last) then from = made
  elseif made < tonumber(from) then from = 0 end
  return math.max(0, made - tonumber(from)) + math.max(0, stalled - tonumber(fromStalled))
end
`

// The numbers of all states are of one moment if no more jobs than a chunk are delayed, or cancelled.
const COUNT = `${ENDED_ATTEMPTS}
local counts = {}
for i = 1, 3 do counts[i] = redis.call('LLEN', KEYS[i]) end
for i = 4, 6 do counts[i] = redis.call('ZCARD', KEYS[i]) end
counts[7] = redis.call('ZCOUNT', KEYS[7], '(' .. ARGV[1], '+inf')
local from, to = tonumber(ARGV[2]), tonumber(ARGV[2]) + ${CHUNK - 1}
local retrying = 0
for _, id in ipairs(redis.call('ZREVRANGE', KEYS[6], from, to)) do
  if endedAttempts(KEYS[9] .. id) > 0 then retrying = retrying + 1 end
end
local skipped = 0
local found = redis.call('ZREVRANGE', KEYS[8], from, to, 'WITHSCORES')
for i = 1, #found, 2 do
  if tonumber(found[i + 1]) > tonumber(ARGV[1]) and redis.call('ZSCORE', KEYS[7], found[i]) == found[i + 1] then skipped = skipped + 1 end
end
counts[8], counts[9], counts[10] = redis.call('ZCARD', KEYS[8]), retrying, skipped
return counts`

/** Counts the jobs of a definition, those whose record `get` reads. */
export async function countJobs (redis: Client, { spec: { keep }, queue }: KnownTask): Promise<JobCounts> {
  const keys = [...['active', ...WAITING_LISTS, ...WAITING_SETS, 'delayed', 'failed'].map(type => queue.toKey(type)), skippedKey(queue), queue.toKey('')]
  let [retrying, skipped] = [0, 0]
  for (let from = 0; ; from += CHUNK) {
    const [running = 0, waiting = 0, paused = 0, prioritized = 0, parents = 0, due = 0, ended = 0, cancelled = 0, ...more] =
      await redis.eval(COUNT, keys.length, ...keys, Date.now() - keep.failed * 1000, from) as number[]
    retrying += more[0] ?? 0
    skipped += more[1] ?? 0
    if (from + CHUNK >= Math.max(due, cancelled)) {
      return {
        pending: waiting + paused + prioritized + parents,
        delayed: Math.max(0, due - retrying),
        running,
        retrying: Math.min(due, retrying),
        failed: Math.max(0, ended - skipped)
      }
    }
  }
}
