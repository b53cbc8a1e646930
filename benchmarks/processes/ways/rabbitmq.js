// @ts-check
import { randomUUID } from 'node:crypto'
import { connect } from 'amqplib'
import { checked, CONCURRENCY, inGroups, inTime, PAYLOAD, RABBITMQ_URL, stored } from './promises.js'

const KEPT = { persistent: true, mandatory: true, contentType: 'application/json' }

/** @type {import('../engine-process.js').OpenWay} */
export async function rabbitmqByHand ({ app, place, way, work }) {
  const queue = `${place}.bench`
  const isBare = way === 'bare'
  const connection = await connect(RABBITMQ_URL)
  const publisher = await connection.createConfirmChannel()
  publisher.on('return', () => { throw new Error('no such queue') })
  await publisher.assertQueue(queue, { durable: true, arguments: { 'x-queue-type': 'quorum' } })
  const publish = (payload, options) => new Promise((resolve, reject) => {
    publisher.sendToQueue(queue, Buffer.from(JSON.stringify(payload)), options, error => { if (error) reject(error); else resolve(undefined) })
  })
  const add = request => {
    if (isBare) return publish(PAYLOAD, { ...KEPT, messageId: randomUUID() })
    const { id, data: { payload, headers, requestId, enqueuedAt } } = stored(request)
    return inTime(publish(payload, { ...KEPT, messageId: id, headers, correlationId: requestId, timestamp: enqueuedAt, type: 'bench' }))
  }
  app.get('/', async request => {
    await add(request)
    return { hello: 'world' }
  })
  return {
    add,
    fill: n => inGroups(n, count => Promise.all(Array.from({ length: count }, () => add(undefined)))),
    drain: async () => {
      const channel = await (await connect(RABBITMQ_URL)).createChannel()
      await channel.prefetch(CONCURRENCY)
      await channel.consume(queue, async message => {
        if (message === null) return
        const payload = JSON.parse(message.content.toString())
        await work(isBare ? payload : checked(payload))
        channel.ack(message)
      })
    }
  }
}
