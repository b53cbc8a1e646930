import { openRabbitMq } from '../support/rabbitmq.js'
import { conformance } from './suite.js'

conformance(async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return undefined
  return {
    name: 'rabbitmq',
    engine: () => broker.engine(),
    supports: { delay: true, key: false, tx: false, get: false, count: true, find: false, retry: true, cancel: false },
    async storeByHand (task, { payload, headers, requestId }) {
      broker.channel.sendToQueue(`${broker.prefix}.${task}`, Buffer.from(JSON.stringify(payload)), { headers, correlationId: String(requestId) })
    }
  }
})
