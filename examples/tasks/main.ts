/**
 * Starts the service: `ENGINE=none|bullmq|pg-boss|rabbitmq|pglite`, PORT (3000), HOST (127.0.0.1), and what `engines.ts` reads. With
 * `DASHBOARD=name:password` and BullMQ there is a dashboard at /dashboard.
 */
import closeWithGrace from 'close-with-grace'
import { buildApp } from './app.js'
import { mountDashboard } from './dashboard.js'
import { placementFrom } from './engines.js'

const { PORT = '3000', HOST = '127.0.0.1', LOG_LEVEL = 'info', ENGINE, DASHBOARD, REDIS_URL = 'redis://127.0.0.1:6379' } = process.env
const { close, ...placement } = await placementFrom(process.env)
const app = await buildApp(placement, { level: LOG_LEVEL })
// Behind the drain: the tasks that are left still need it.
app.addHook('onClose', close)
if (ENGINE === 'bullmq' && DASHBOARD !== undefined) {
  const [name = '', password = ''] = DASHBOARD.split(':')
  await mountDashboard(app, REDIS_URL, { name, password })
}
closeWithGrace(async () => { await app.close() })
console.log(`listening on ${await app.listen({ port: Number(PORT), host: HOST })}`)
