/** Tells of jobs that end. */
import { QueueEvents } from 'bullmq'
import type { Client } from './connection.js'
import type { TaskQueue } from './jobs.js'

/** Milliseconds for which one command waits for events. A cluster's connection counts as lost after 5 s without an answer. */
const WAIT_MS = 2000

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
  return () => { void events.close().catch(() => {}) }
}
