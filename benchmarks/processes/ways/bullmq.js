// @ts-check
import { randomUUID } from 'node:crypto'
import { Queue, QueueEvents, Worker } from 'bullmq'
import { checked, CONCURRENCY, inGroups, inTime, PAYLOAD, REDIS_URL, stored } from './promises.js'

const KEEP = { removeOnComplete: { age: 3600 }, removeOnFail: { age: 604800 } }

/** @type {import('../engine-process.js').OpenWay} */
export async function bullmqByHand ({ app, place, way, work }) {
  const queue = new Queue('bench', { connection: { url: REDIS_URL }, prefix: place })
  const isBare = way === 'bare'
  const add = request => {
    if (isBare) return queue.add('bench', PAYLOAD, { jobId: randomUUID(), ...KEEP })
    const { id, data } = stored(request)
    return inTime(queue.add('bench', data, { jobId: id, ...KEEP }))
  }
  app.get('/', async request => {
    await add(request)
    return { hello: 'world' }
  })
  /** @type {QueueEvents | undefined} */
  let events
  return {
    add,
    delayed (delay, payload) {
      const { id, data } = stored(undefined, payload)
      return inTime(queue.add('bench', data, { jobId: id, delay, ...KEEP }))
    },
    async wait () {
      events ??= new QueueEvents('bench', { connection: { url: REDIS_URL }, prefix: place })
      return await (await add(undefined)).waitUntilFinished(events, 60_000)
    },
    fill: n => inGroups(n, count => queue.addBulk(Array.from({ length: count }, () => {
      const { id, data } = stored(undefined)
      return { name: 'bench', data: isBare ? PAYLOAD : data, opts: { jobId: id, ...KEEP } }
    }))),
    drain: async () => {
      const run = async job => work(isBare ? job.data : checked(job.data.payload))
      new Worker('bench', run, { connection: { url: REDIS_URL }, prefix: place, concurrency: CONCURRENCY }).on('error', error => { console.error(error.message) })
    }
  }
}
