import basicAuth from '@fastify/basic-auth'
import { createBullBoard } from '@bull-board/api'
import { BullMQAdapter } from '@bull-board/api/bullMQAdapter'
import { FastifyAdapter } from '@bull-board/fastify'
import { Queue } from 'bullmq'
import type { FastifyInstance } from 'fastify'

/**
 * BullMQ's dashboard at `/dashboard`, behind a login: it shows payloads, and has a button that deletes jobs.
 * @param prefix that of `bullmq()`
 */
export async function mountDashboard (app: FastifyInstance, redisUrl: string, login: { name: string, password: string }, prefix = 'fbt'): Promise<void> {
  // What the engine has set for the queue stays.
  const queue = new Queue('make-report', { connection: { url: redisUrl }, prefix, skipMetasUpdate: true })
  queue.on('error', error => { app.log.warn(error.message) })
  const board = new FastifyAdapter()
  board.setBasePath('/dashboard')
  createBullBoard({ queues: [new BullMQAdapter(queue)], serverAdapter: board })
  await app.register(async dashboard => {
    await dashboard.register(basicAuth, {
      authenticate: { realm: 'dashboard' },
      async validate (name, password) {
        if (name !== login.name || password !== login.password) throw new Error('wrong name or password')
      }
    })
    dashboard.addHook('onRequest', dashboard.basicAuth)
    dashboard.addHook('onClose', async () => { await queue.close() })
    await dashboard.register(board.registerPlugin())
  }, { prefix: '/dashboard' })
}
