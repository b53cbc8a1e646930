import swagger from '@fastify/swagger'
import swaggerUi from '@fastify/swagger-ui'
import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
import backgroundTasks from 'fastify-background-tasks'
import { notifications, type NotificationsOptions } from './notifications.js'

export interface AppOptions extends NotificationsOptions {
  logger?: FastifyServerOptions['logger']
}

/** The service: one route, its docs at `/docs`, and background tasks that are finished before the mailer is closed. */
export async function buildApp ({ mailer, logFile, logger = false }: AppOptions): Promise<FastifyInstance> {
  const app = Fastify({ logger })
  app.addHook('onClose', async () => { await mailer.close() })

  await app.register(swagger, { openapi: { info: { title: 'Notifications', version: '1.0.0' } } })
  await app.register(swaggerUi, { routePrefix: '/docs' })
  // Past a thousand unfinished tasks the service answers 503 and `Retry-After`, rather than promise what it cannot keep.
  await app.register(backgroundTasks, { maxPending: 1_000 })
  await app.register(notifications, { mailer, logFile })
  return app
}
