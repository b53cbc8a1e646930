/** Finds the records of a state, newest first. */
import type { JobPosition, JobQuery, JobRecord, JobState } from '../engine.js'
import { isBehind, newestFirst } from '../page-order.js'
import { timeOf } from '../stored-task.js'
import { WAITING_LISTS, WAITING_SETS } from './cancelled.js'
import type { Client } from './connection.js'
import { ENDED_ATTEMPTS } from './counts.js'
import { skippedKey, type KnownTask } from './jobs.js'
import { findInOrder } from './order.js'
import { readJobs } from './records.js'

/** Jobs that one call of the script looks at, so that Redis is not kept from other work. */
const CHUNK = 1000
/** Failed jobs that are looked at without a stored order. */
const MAX_UNORDERED = 5000
/** Milliseconds by which the clocks of processes may differ: a job may seem to end before it was added. */
const MAX_CLOCK_SKEW = 60_000

/** Where the jobs of a state are. */
interface Source {
  readonly type: string
  readonly isList?: boolean
  /** Only some of these jobs are in the state. */
  readonly only?: 'delayed' | 'retrying' | 'failed'
  /** Seconds for which records are kept, of a set whose scores are the times of the ends. */
  readonly keep?: number
}

/** What comes first, and whether nothing comes after it. */
interface Found {
  readonly candidates: readonly JobPosition[]
  readonly isLast: boolean
}

const SCAN = `${ENDED_ATTEMPTS}
local from, to, after, least, only = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local isList = ARGV[6] == '1'
local jobs = isList and redis.call('LRANGE', KEYS[1], from, to) or redis.call('ZREVRANGE', KEYS[1], from, to, 'WITHSCORES')
local step = isList and 1 or 2
local found = {}
for i = 1, #jobs, step do
  local id = jobs[i]
  local job = KEYS[2] .. id
  local timestamp = redis.call('HGET', job, 'timestamp')
  if timestamp then
    local time = tonumber(timestamp) or 0
    if time ~= time or math.abs(time) > 8.64e15 then time = 0 end
    local isIt = time < after + 1 and time > least - 1
    if isIt and only == 'failed' then isIt = redis.call('ZSCORE', KEYS[3], id) ~= jobs[i + 1]
    elseif isIt and only ~= '' then isIt = (endedAttempts(job) > 0) == (only == 'retrying') end
    if isIt then
      found[#found + 1] = id
      found[#found + 1] = timestamp
    end
  end
end
return { #jobs / step, isList and '' or jobs[#jobs] or '', found }`

/** Reads the records that a query asks for. */
export async function findJobs (redis: Client, known: KnownTask, { state, limit, after, payload }: JobQuery): Promise<JobRecord[]> {
  const sources = sourcesOf(state, known)
  const page: JobRecord[] = []
  let position = after
  for (;;) {
    const wanted = limit - page.length
    const { candidates, isLast } = state === 'failed'
      ? await searchFailed(redis, known, sources, position, wanted)
      : await search(redis, known, sources, position, wanted) as Found
    const jobs = await readJobs(redis, known, candidates.map(({ id }) => id), payload)
    for (const [i, job] of jobs.entries()) {
      // A job may have changed meanwhile.
      if (job?.record.state === state && Date.parse(job.record.enqueuedAt) === candidates[i]?.enqueuedAt) page.push(job.record)
    }
    if (isLast || page.length >= limit) return page
    position = candidates.at(-1) ?? position
  }
}

async function searchFailed (redis: Client, known: KnownTask, sources: readonly Source[], after: JobPosition | undefined, limit: number): Promise<Found> {
  return await findInOrder(redis, known, after, limit, false) ??
    await search(redis, known, sources, after, limit, MAX_UNORDERED) ??
    await findInOrder(redis, known, after, limit, true) ??
    await search(redis, known, sources, after, limit) as Found
}

/**
 * Searches the jobs of a state for those that come first.
 * @param most how many jobs may be looked at
 * @returns undefined if these were not enough
 */
async function search (redis: Client, known: KnownTask, sources: readonly Source[], after: JobPosition | undefined, limit: number, most = Infinity): Promise<Found | undefined> {
  const newest = new Newest(limit)
  for (const source of sources) if (!await scan(redis, known, source, after, newest, most)) return undefined
  return { candidates: newest.take(), isLast: newest.isAll }
}

async function scan (redis: Client, { queue }: KnownTask, { type, isList = false, only, keep }: Source, after: JobPosition | undefined, newest: Newest, most: number): Promise<boolean> {
  const keys = [type === 'skipped' ? skippedKey(queue) : queue.toKey(type), queue.toKey(''), skippedKey(queue)]
  for (let from = 0; from < most; from += CHUNK) {
    const [count, score, found] = await redis.eval(SCAN, keys.length, ...keys,
      from, from + CHUNK - 1, after?.enqueuedAt ?? 'inf', newest.least ?? '-inf', only ?? '', isList ? '1' : '0') as [number, string, string[]]
    for (let i = 0; i < found.length; i += 2) {
      const candidate = { id: found[i] as string, enqueuedAt: toTime(found[i + 1]) }
      if (isBehind(candidate, after)) newest.add(candidate)
    }
    if (count < CHUNK) return true
    if (keep === undefined) continue
    // The other jobs have ended before, so they were added before.
    const endedAt = Number(score)
    if (endedAt <= Date.now() - keep * 1000 || (newest.least !== undefined && newest.least > endedAt + MAX_CLOCK_SKEW)) return true
  }
  return false
}

/** The newest of the candidates that were seen. */
class Newest {
  readonly #limit: number
  #found = new Map<string, JobPosition>()
  /** Whether no candidate was left out. */
  isAll = true
  /** The time below which no candidate is among them, once there are enough. */
  least: number | undefined

  constructor (limit: number) {
    this.#limit = limit
  }

  add (candidate: JobPosition): void {
    this.#found.set(candidate.id, candidate)
    if (this.#found.size >= this.#limit + CHUNK) this.#cut()
  }

  take (): JobPosition[] {
    this.#cut()
    return [...this.#found.values()]
  }

  #cut (): void {
    const sorted = [...this.#found.values()].sort(newestFirst)
    if (sorted.length <= this.#limit) {
      this.#found = new Map(sorted.map(candidate => [candidate.id, candidate]))
      return
    }
    this.isAll = false
    const kept = sorted.slice(0, this.#limit)
    this.least = kept.at(-1)?.enqueuedAt
    this.#found = new Map(kept.map(candidate => [candidate.id, candidate]))
  }
}

function sourcesOf (state: JobState, { spec: { keep } }: KnownTask): readonly Source[] {
  switch (state) {
    case 'pending': return [...WAITING_LISTS.map(type => ({ type, isList: true })), ...WAITING_SETS.map(type => ({ type }))]
    case 'delayed':
    case 'retrying': return [{ type: 'delayed', only: state }]
    case 'running': return [{ type: 'active', isList: true }]
    case 'succeeded': return [{ type: 'completed', keep: keep.succeeded }]
    case 'failed': return [{ type: 'failed', only: 'failed', keep: keep.failed }]
    case 'skipped': return [{ type: 'skipped', keep: keep.failed }]
    case 'abandoned': return []
  }
}

/** The time of a record, as it is in its text. */
function toTime (timestamp: string | undefined): number {
  return Math.trunc(timeOf(Number(timestamp)) ?? 0)
}
