import type { FastifyInstance } from 'fastify'
import taskRoutes from 'fastify-background-tasks/routes'
import { addLogin, type Login } from './login.js'

/** The operator's routes at `/operator`, on any engine, behind a login. They are in the documentation at `/docs`. */
export async function mountOperator (app: FastifyInstance, login: Login): Promise<void> {
  await app.register(async operator => {
    await addLogin(operator, 'operator', login)
    await operator.register(taskRoutes, { prefix: '/operator', onRequest: operator.basicAuth })
  })
}
