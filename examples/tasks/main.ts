/**
 * Starts the service: `ENGINE=none|bullmq|pg-boss|rabbitmq|pglite`, PORT (3000), HOST (127.0.0.1), LOG_LEVEL (info), and what
 * `engines.ts` reads. With `DASHBOARD=name:password` and BullMQ there is a dashboard at /dashboard.
 */
import closeWithGrace from 'close-with-grace'
import { printBlock } from '../notifications/print.js'
import { buildApp } from './app.js'
import { mountDashboard } from './dashboard.js'
import { placementFrom } from './engines.js'

const { PORT = '3000', HOST = '127.0.0.1', LOG_LEVEL = 'info', ENGINE = 'none', DASHBOARD, REDIS_URL = 'redis://127.0.0.1:6379' } = process.env
const { close, ...placement } = await placementFrom(process.env)
const app = await buildApp(placement, { level: LOG_LEVEL })
// After the drain: the tasks that are left still need it.
app.addHook('onClose', close)
const hasDashboard = ENGINE === 'bullmq' && DASHBOARD !== undefined
if (hasDashboard) {
  const [name = '', password = ''] = DASHBOARD.split(':')
  await mountDashboard(app, REDIS_URL, { name, password })
}
closeWithGrace(async () => { await app.close() })
const address = await app.listen({ port: Number(PORT), host: HOST })
const { key: canKey, get: canGet } = placement.engine?.supports ?? { key: true, get: true }
const json = '-H \'content-type: application/json\''
console.log(`listening on ${address}`)
printBlock('\nYour turn', [
  `${address}/docs`,
  ...hasDashboard ? [`${address}/dashboard`] : [],
  '',
  '# Order a report of 50 pages, which takes 5 s:',
  `curl -i -X POST ${address}/reports ${json} -d '{"title":"spring","pages":50}'`,
  ...canGet ? ['# Follow it, with the id from the reply:', `curl ${address}/tasks/<id>`] : [],
  '# The first attempt of this one fails:',
  `curl -X POST ${address}/reports ${json} -d '{"title":"flaky"}'`,
  ...canKey ? ['# Twice with one key is one report:', `curl -X POST ${address}/reports ${json} -H 'idempotency-key: 17' -d '{"title":"summer"}'`] : [],
  '',
  `ENGINE      none, bullmq, pg-boss, rabbitmq, or pglite, which needs no server. Now: ${ENGINE}`,
  'REDIS_URL, POSTGRES_URL, RABBITMQ_URL   the server of the engine',
  'DATA        the folder of pglite: reports-data',
  'WORKER      false: this process only stores jobs',
  'DASHBOARD   name:password, with ENGINE=bullmq: a dashboard at /dashboard',
  'PORT, HOST, LOG_LEVEL',
  '',
  'Ctrl+C stops the service once its background tasks are done.'
])
