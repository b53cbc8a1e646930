import { createBullBoard } from '@bull-board/api'
import { BullMQAdapter } from '@bull-board/api/bullMQAdapter'
import { FastifyAdapter } from '@bull-board/fastify'
import { Queue } from 'bullmq'
import type { FastifyInstance } from 'fastify'
import { addLogin, type Login } from './login.js'

/**
 * BullMQ's dashboard at `/dashboard`, behind a login: it shows payloads, and has a button that deletes jobs.
 * @param prefix that of `bullmq()`
 */
export async function mountDashboard (app: FastifyInstance, redisUrl: string, login: Login, prefix = 'fbt'): Promise<void> {
  // What the engine has set for the queue stays.
  const queue = new Queue('make-report', { connection: { url: redisUrl }, prefix, skipMetasUpdate: true })
  queue.on('error', error => { app.log.warn(error.message) })
  const board = new FastifyAdapter()
  board.setBasePath('/dashboard')
  createBullBoard({ queues: [new BullMQAdapter(queue)], serverAdapter: board })
  await app.register(async dashboard => {
    await addLogin(dashboard, 'dashboard', login)
    dashboard.addHook('onRequest', dashboard.basicAuth)
    dashboard.addHook('onClose', async () => { await queue.close() })
    await dashboard.register(board.registerPlugin())
  }, { prefix: '/dashboard' })
}
