import type { Queue } from 'pg-boss'
import type { TaskSpec } from '../engine.js'
import type { Pool } from './pool.js'
import { keepTimes } from './statements.js'
import { RETRY_LIMIT } from './texts.js'

/** Seconds without a sign of life after which a job's process counts as dead. pg-boss accepts no less. */
const HEARTBEAT_SECONDS = 10
/** Seconds: ten years, so that a job that waits does not vanish. */
const RETENTION_SECONDS = 315_360_000
/** Queues that are declared at the same time. The pool of pg-boss has so many connections. */
const PARALLEL = 10

/**
 * Declares one queue for each definition. Those that are there already, with the right settings, cost one statement together.
 * @param onDeclared called after each declaration
 */
export async function declareQueues (pool: Pool, tasks: readonly TaskSpec[], onDeclared?: () => void): Promise<void> {
  const names = tasks.map(({ name }) => name)
  // `createQueue` leaves a queue that another process has just created as it is. So the queues are read again after it.
  for (let round = 0; round < 2; round++) {
    const found = new Map((await pool.boss.getQueues(names)).map(queue => [queue.name, queue]))
    refusePolicies(found.values())
    const left = tasks.filter(task => !isDeclared(found.get(task.name), task))
    if (left.length === 0) return
    await inParallel(left, async task => {
      if (found.has(task.name)) await pool.boss.updateQueue(task.name, settingsOf(task))
      else await pool.boss.createQueue(task.name, settingsOf(task))
      onDeclared?.()
    })
  }
}

/** The core decides about retries, and pg-boss never fails a job by itself. */
function settingsOf ({ keep }: TaskSpec) {
  return {
    notify: true,
    retryLimit: RETRY_LIMIT,
    retryDelay: 0,
    retryBackoff: false,
    heartbeatSeconds: HEARTBEAT_SECONDS,
    retentionSeconds: RETENTION_SECONDS,
    deleteAfterSeconds: keepTimes(keep).succeeded
  }
}

/** pg-boss silently drops jobs that the policy of their queue excludes, and cannot change the policy of a queue. */
function refusePolicies (queues: Iterable<Queue>): void {
  for (const { name, policy } of queues) {
    if (policy !== undefined && policy !== 'standard') {
      throw new Error(`the queue "${name}" has the policy "${policy}", which drops jobs: a definition needs a queue with the policy "standard". Delete the queue, or use another schema`)
    }
  }
}

function isDeclared (queue: Queue | undefined, task: TaskSpec): boolean {
  if (queue === undefined) return false
  const found = queue as unknown as Record<string, unknown>
  return Object.entries(settingsOf(task)).every(([name, value]) => found[name] === value)
}

async function inParallel<T> (items: readonly T[], use: (item: T) => Promise<void>): Promise<void> {
  const left = items.values()
  await Promise.all(Array.from({ length: PARALLEL }, async () => {
    for (const item of left) await use(item)
  }))
}
