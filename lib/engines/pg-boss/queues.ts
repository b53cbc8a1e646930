import type { Queue } from 'pg-boss'
import type { TaskSpec } from '../engine.js'
import type { Pool } from './pool.js'
import { EXPIRE_SECONDS, keepTimes, neverExpire } from './statements.js'
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
export async function declareQueues (pool: Pool, schema: string, tasks: readonly TaskSpec[], onDeclared?: () => void): Promise<void> {
  const names = tasks.map(({ name }) => name)
  // `createQueue` leaves a queue that another process has just created as it is. So the queues are read again after it.
  for (let round = 0; round < 2; round++) {
    const found = new Map((await pool.boss.getQueues(names)).map(queue => [queue.name, queue]))
    const left = tasks.filter(task => !isDeclared(found.get(task.name), task))
    if (left.length === 0) return
    await inParallel(left, async task => {
      if (found.has(task.name)) await pool.boss.updateQueue(task.name, settingsOf(task))
      else await pool.boss.createQueue(task.name, settingsOf(task))
      onDeclared?.()
    })
    await pool.boss.getDb().executeSql(neverExpire(schema), [names])
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

function isDeclared (queue: Queue | undefined, task: TaskSpec): boolean {
  if (queue === undefined) return false
  const found = queue as unknown as Record<string, unknown>
  return Object.entries({ ...settingsOf(task), expireInSeconds: EXPIRE_SECONDS }).every(([name, value]) => found[name] === value)
}

async function inParallel<T> (items: readonly T[], use: (item: T) => Promise<void>): Promise<void> {
  const left = items.values()
  await Promise.all(Array.from({ length: PARALLEL }, async () => {
    for (const item of left) await use(item)
  }))
}
