/** The code of docs/from-fastapi.md: the apps of FastAPI's and Starlette's pages on background tasks. */
import { appendFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { Type } from '@sinclair/typebox'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import { bullmq } from '../../lib/engines/bullmq/index.js'
import backgroundTasks, { BackgroundTask, defineTask, type TaskEngine } from '../../lib/index.js'

async function writeNotification (email: string, { message = '' } = {}): Promise<void> {
  await appendFile('log.txt', `notification for ${email}: ${message}\n`)
}

async function writeLog (message: string): Promise<void> {
  await appendFile('log.txt', message)
}

/** The first example of the tutorial. */
export async function notifications (): Promise<FastifyInstance> {
  const app = Fastify()
  await app.register(backgroundTasks)

  app.post<{ Params: { email: string } }>('/send-notification/:email', async request => {
    request.backgroundTasks.addTask(writeNotification, request.params.email, { message: 'some notification' })
    return { message: 'Notification sent in the background' }
  })
  return app
}

async function getQuery (request: FastifyRequest<{ Querystring: { q?: string } }>): Promise<void> {
  const { q } = request.query
  if (q !== undefined) request.backgroundTasks.addTask(writeLog, `found query: ${q}\n`)
}

/** The second one: a dependency that adds tasks, too. */
export async function withDependency (app: FastifyInstance): Promise<void> {
  app.post<{ Params: { email: string }, Querystring: { q?: string } }>('/send-notification/:email', { preHandler: getQuery }, async request => {
    request.backgroundTasks.addTask(writeLog, `message to ${request.params.email}\n`)
    return { message: 'Message sent' }
  })
}

async function sendWelcomeEmail (to: string): Promise<void> {
  await writeLog(`welcome, ${to}\n`)
}

async function sendAdminNotification (username: string): Promise<void> {
  await writeLog(`${username} has signed up\n`)
}

/** Starlette's page: tasks made by hand. */
export async function signup (app: FastifyInstance): Promise<void> {
  app.post<{ Body: { email: string, username: string } }>('/user/signup', async (request, reply) => {
    const { email, username } = request.body
    const welcome = new BackgroundTask(sendWelcomeEmail, email)
    request.backgroundTasks.addTask(welcome)
    request.backgroundTasks.addTask(sendAdminNotification, username)
    return await reply.send({ status: 'Signup successful' })
  })
}

class PaymentFailed extends Error {}

async function alertSupport (message: string): Promise<void> {
  await writeLog(`support: ${message}\n`)
}

async function sendReceipt (email: string): Promise<void> {
  await writeLog(`receipt for ${email}\n`)
}

/** An exception handler whose response has a task. */
export async function payments (app: FastifyInstance): Promise<void> {
  app.setErrorHandler(async (error, request, reply) => {
    if (!(error instanceof PaymentFailed)) throw error
    request.backgroundTasks.addTask(alertSupport, error.message)
    return await reply.code(402).send({ message: 'The payment failed' })
  })

  app.post<{ Body: { email: string } }>('/payments', async request => {
    request.backgroundTasks.addTask(sendReceipt, request.body.email)
    throw new PaymentFailed('the bank is closed')
  })
}

const makeReport = defineTask({
  name: 'make-report',
  payload: Type.Object({ title: Type.String() }),
  async handler ({ title }, { signal }) {
    await sleep(100, undefined, { signal })
    return { file: `${title}.pdf` }
  }
})

export const engine = bullmq({ connection: 'redis://127.0.0.1:6379' })

/** What FastAPI leaves to Celery. */
export async function reports (app: FastifyInstance, engine: TaskEngine<unknown>): Promise<void> {
  await app.register(backgroundTasks, { tasks: [makeReport], engine })

  app.post<{ Body: { title: string } }>('/reports', async (request, reply) => {
    const task = request.backgroundTasks.addTask(makeReport, { title: request.body.title })
    return await reply.code(202).send({ id: task.id })
  })
}
