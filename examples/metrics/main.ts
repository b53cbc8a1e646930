/** Starts the shop: PORT (3000), HOST (127.0.0.1), LOG_LEVEL (info). */
import closeWithGrace from 'close-with-grace'
import { printBlock } from '../notifications/print.js'
import { buildApp } from './app.js'

const { PORT = '3000', HOST = '127.0.0.1', LOG_LEVEL = 'info' } = process.env
const app = await buildApp({ level: LOG_LEVEL })
closeWithGrace(async () => { await app.close() })
const address = await app.listen({ port: Number(PORT), host: HOST })
console.log(`listening on ${address}`)
printBlock('\nYour turn', [
  '# Adds four tasks: one fails its first attempt, and one fails for good:',
  `curl -X POST ${address}/orders`,
  '# Is refused with a 409, so its task is skipped:',
  `curl -X DELETE ${address}/orders/1`,
  '# What Prometheus reads:',
  `curl -s ${address}/metrics | grep '^background_task'`,
  '',
  'PORT, HOST, LOG_LEVEL   for example: PORT=3001 npm run example:metrics',
  '',
  'Ctrl+C stops the service once its background tasks are done.'
])
