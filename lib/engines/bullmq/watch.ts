/** Tells of jobs that end. */
import { QueueEvents } from 'bullmq'
import { Timer } from '../../timers.js'
import type { Client } from './connection.js'
import type { TaskQueue } from './jobs.js'

/** Milliseconds for which one command waits for events. A cluster's connection counts as lost after 5 s without an answer. */
const WAIT_MS = 2000

/** Entries that the stream of events of a queue keeps while somebody waits. A job has about four, and a hundred may end before it is read once. */
const WATCHED_EVENTS = 1000
/** Milliseconds after which that is set again. A process that starts sets what the stream keeps otherwise. */
const RENEW_MS = 5000
const KEPT = 'opts.maxLenEvents'

const RAISE = "if tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or 0) < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end"
const LOWER = "if redis.call('HGET', KEYS[1], ARGV[1]) == ARGV[2] then redis.call('HSET', KEYS[1], ARGV[1], ARGV[3]) end"

/**
 * Calls back with the ids of jobs that end, until the function that this returns is called. BullMQ's stream of events may be cut before it is read, so
 * some can be missed.
 */
export function watchEnds (redis: Client, queue: TaskQueue, prefix: string, onEnd: (ids: readonly string[]) => void): () => void {
  const events = new QueueEvents(queue.name, { connection: redis, prefix, blockingTimeout: WAIT_MS })
  // The connection has its own listener.
  events.on('error', () => {})
  const tell = ({ jobId }: { readonly jobId: string }): void => { onEnd([jobId]) }
  for (const event of ['completed', 'failed', 'removed'] as const) events.on(event, tell)
  const lower = keepMoreEvents(redis, queue)
  return () => {
    lower()
    void events.close().catch(() => {})
  }
}

/** Lets the stream of events keep more entries, until the function that this returns is called. The end of a job that is missed is found half a second later. */
function keepMoreEvents (redis: Client, queue: TaskQueue): () => void {
  const { maxLen = 0 } = queue.opts.streams?.events ?? {}
  const ask = (script: string, ...args: number[]): void => { redis.eval(script, 1, queue.toKey('meta'), KEPT, WATCHED_EVENTS, ...args).catch(() => {}) }
  let timer: Timer
  const raise = (): void => {
    ask(RAISE)
    timer = new Timer(raise, RENEW_MS)
  }
  raise()
  return () => {
    timer.clear()
    ask(LOWER, maxLen)
  }
}
