import { openRabbitMq } from '../support/rabbitmq.js'
import { conformance } from './suite.js'

conformance(async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return undefined
  return { name: 'rabbitmq', engine: () => broker.engine(), supports: { delay: true, key: false, tx: false, get: false } }
})
