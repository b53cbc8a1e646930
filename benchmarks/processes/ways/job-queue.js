// @ts-check
/** Needs Node 22.19 or later. */
import { randomUUID } from 'node:crypto'
import { Queue, RedisStorage } from '@platformatic/job-queue'
import { CONCURRENCY, inGroups, PAYLOAD, REDIS_URL } from './promises.js'

/** @type {import('../engine-process.js').OpenWay} */
export async function jobQueue ({ app, place, role, work }) {
  const open = () => new Queue({ storage: new RedisStorage({ url: REDIS_URL, keyPrefix: `${place}:` }), concurrency: CONCURRENCY })
  const producer = open()
  // A queue without a handler stores, and takes nothing.
  await producer.start()
  const add = () => producer.enqueue(randomUUID(), PAYLOAD)
  app.get('/', async () => {
    await add()
    return { hello: 'world' }
  })
  return {
    add,
    wait: () => producer.enqueueAndWait(randomUUID(), PAYLOAD, { timeout: 60_000 }),
    fill: n => inGroups(n, count => Promise.all(Array.from({ length: count }, add))),
    drain: async () => {
      const consumer = open()
      consumer.execute(async job => {
        await work(job.payload)
        // It knows neither undefined nor null as a result.
        return true
      })
      await consumer.start()
    }
  }
}
