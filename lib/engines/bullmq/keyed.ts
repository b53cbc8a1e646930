/** Stores jobs that have a key. */
import type { JobsOptions } from 'bullmq'
import type { ChainableCommander } from 'ioredis'
import type { Job, Receipt } from '../engine.js'
import { removeCancelled } from './cancelled.js'
import type { Client } from './connection.js'
import { JsonJob, skippedKey, type JsonData, type KnownTask } from './jobs.js'
import { isExpired } from './records.js'

/** BullMQ does not tell that a job of this id is stored already, so the same transaction asks for it first. */
export async function addKeyed (redis: Client, known: KnownTask, job: Job, data: JsonData, options: JobsOptions): Promise<Receipt> {
  const { id } = job
  const { spec: { keep }, queue } = known
  const client = await queue.getBackend().client
  const transaction = client.multi()
  // The client is ioredis. BullMQ's type of it declares only what BullMQ uses.
  const reads = transaction as unknown as ChainableCommander
  reads.exists(queue.toKey(id)).zscore(queue.toKey('completed'), id).zscore(queue.toKey('failed'), id).zscore(skippedKey(queue), id)
  await new JsonJob(queue, job.task, data, options, id).addJob(transaction)
  const [exists, succeededAt, failedAt, skippedAt] = await repliesOf(transaction)
  if (exists === 0) return { id, duplicate: false }
  // BullMQ removes an expired record only when another job of the queue ends.
  if (isExpired(succeededAt, keep.succeeded)) await queue.clean(keep.succeeded * 1000, 0, 'completed')
  else if (isExpired(failedAt, keep.failed)) await queue.clean(keep.failed * 1000, 0, 'failed')
  else if (failedAt !== null && failedAt === skippedAt) await removeCancelled(redis, queue, id)
  else return { id, duplicate: true }
  return await addKeyed(redis, known, job, data, options)
}

/** Rejects with the first error of a transaction. */
async function repliesOf (transaction: { exec: () => Promise<Array<[Error | null, unknown]> | null> }): Promise<unknown[]> {
  const results = await transaction.exec() ?? []
  return results.map(([error, reply]) => {
    if (error !== null) throw error
    return reply
  })
}
