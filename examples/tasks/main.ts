/**
 * Starts the service: `ENGINE=none|bullmq|pg-boss|rabbitmq|pglite`, PORT (3000), HOST (127.0.0.1), LOG_LEVEL (info), and what
 * `engines.ts` reads. With `LOGIN=name:password` there are the operator's routes at /operator, and with BullMQ a dashboard at /dashboard.
 */
import closeWithGrace from 'close-with-grace'
import { printBlock } from '../notifications/print.js'
import { buildApp } from './app.js'
import { mountDashboard } from './dashboard.js'
import { placementFrom } from './engines.js'
import { mountOperator } from './operator.js'

const { PORT = '3000', HOST = '127.0.0.1', LOG_LEVEL = 'info', ENGINE = 'none', LOGIN, REDIS_URL = 'redis://127.0.0.1:6379' } = process.env
const { close, ...placement } = await placementFrom(process.env)
const app = await buildApp(placement, { level: LOG_LEVEL })
// After the drain: the tasks that are left still need it.
app.addHook('onClose', close)
const [name = '', password = ''] = LOGIN?.split(':') ?? []
const hasDashboard = ENGINE === 'bullmq' && LOGIN !== undefined
if (LOGIN !== undefined) await mountOperator(app, { name, password })
if (hasDashboard) await mountDashboard(app, REDIS_URL, { name, password })
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
  '# Is a report soon there, this answers with it: after 300 ms at most',
  `curl -i -X POST ${address}/reports/soon ${json} -d '{"title":"memo","pages":1}'`,
  '# The first attempt of this one fails:',
  `curl -X POST ${address}/reports ${json} -d '{"title":"flaky"}'`,
  ...canKey ? ['# Twice with one key is one report:', `curl -X POST ${address}/reports ${json} -H 'idempotency-key: 17' -d '{"title":"summer"}'`] : [],
  ...LOGIN !== undefined
    ? ['# What waits and what has failed; start one again that has failed, or cancel one:', `curl -u ${name} ${address}/operator`, `curl -u ${name} '${address}/operator/make-report?state=failed'`,
        `curl -u ${name} -X POST ${address}/operator/make-report/<id>/retry`, `curl -u ${name} -X DELETE ${address}/operator/make-report/<id>`]
    : [],
  '',
  `ENGINE      none, bullmq, pg-boss, rabbitmq, or pglite, which needs no server. Now: ${ENGINE}`,
  'REDIS_URL, POSTGRES_URL, RABBITMQ_URL   the server of the engine',
  'DATA        the folder of pglite: reports-data',
  'WORKER      false: this process only stores jobs',
  'LOGIN       name:password: the operator\'s routes at /operator, and with ENGINE=bullmq a dashboard at /dashboard',
  'PORT, HOST, LOG_LEVEL',
  '',
  'Ctrl+C stops the service once its background tasks are done.'
])
