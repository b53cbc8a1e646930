/** The code of docs/operating.md. */
import { subscribe } from 'node:diagnostics_channel'
import { writeFileSync } from 'node:fs'
import basicAuth from '@fastify/basic-auth'
import Fastify, { type FastifyInstance } from 'fastify'
import backgroundTasks, { defineTask, type TaskDefinition, type TaskEngine, type TaskRecord, type TaskRunMessage } from '../../lib/index.js'
import taskRoutes from '../../lib/routes.js'

/** What was written. */
export const written: string[] = []
/** Whether the mail server is down. */
export const mail = { isDown: false }

async function writeLog (line: string): Promise<void> {
  written.push(line)
}

export const sendEmail = defineTask({
  name: 'send-email',
  retry: { attempts: 1 },
  handler ({ to }: { to: string, subject: string }) {
    if (mail.isDown) throw new Error('the mail server is down')
    if (!to.includes('@')) throw new Error('no address')
  }
})

export async function counted (app: FastifyInstance): Promise<object> {
  const { pending, delayed, running, retrying, failed } = await app.backgroundTasks.count(sendEmail)
  return { pending, delayed, running, retrying, failed }
}

export async function found (app: FastifyInstance): Promise<{ reasons: string[], next: string | undefined }> {
  const { records, next } = await app.backgroundTasks.find(sendEmail, { state: 'failed', limit: 50 })
  const reasons = records.map(({ id, attempt, finishedAt, error }) => `${id} has failed after ${attempt} attempts at ${finishedAt}: ${error?.message}`)
  return { reasons, next }
}

export async function retried (app: FastifyInstance, id: string): Promise<boolean> {
  const willStart = await app.backgroundTasks.retry(sendEmail, id)   // false if no task of this id has failed
  return willStart
}

export function retriers (app: FastifyInstance) {
  async function retryAll (definition: TaskDefinition, message: string): Promise<number> {
    let retried = 0
    let after: string | undefined
    do {
      const page = await app.backgroundTasks.find(definition, { state: 'failed', limit: 500, after })
      for (const { id, error } of page.records) {
        if (error?.message === message && await app.backgroundTasks.retry(definition, id)) retried++
      }
      after = page.next
    } while (after !== undefined)
    return retried
  }

  async function retryRefused (definition: TaskDefinition): Promise<number> {
    const page = await app.backgroundTasks.find(definition, { state: 'failed', limit: 500 })
    const refused = page.records.filter(({ error }) => error?.code === 'FST_BGT_INVALID_PAYLOAD')
    const retried = await Promise.all(refused.map(async ({ id }) => await app.backgroundTasks.retry(definition, id)))
    return retried.filter(Boolean).length
  }

  return { retryAll, retryRefused }
}

export async function cancelled (app: FastifyInstance, id: string): Promise<boolean> {
  const isCancelled = await app.backgroundTasks.cancel(sendEmail, id)   // false if it has ended, or there is no task of this id
  return isCancelled
}

export async function waited (app: FastifyInstance, id: string): Promise<TaskRecord | undefined> {
  const record = await app.backgroundTasks.result(sendEmail, id, { timeout: 300 })   // undefined if it has not ended after 300 ms
  return record
}

export async function withRoutes (): Promise<FastifyInstance> {
  const app = Fastify({ logger: true })
  await app.register(backgroundTasks, { tasks: [sendEmail] })
  await app.register(basicAuth, {
    authenticate: { realm: 'operator' },
    async validate (name, password) {
      if (name !== 'ada' || password !== process.env.OPERATOR_PASSWORD) throw new Error('wrong name or password')
    }
  })
  await app.register(taskRoutes, { prefix: '/operator', onRequest: app.basicAuth })
  return app
}

export function logStarts (app: FastifyInstance): void {
  subscribe('tracing:fastify-background-tasks.run:start', message => {
    const { task: { id, name }, attempt } = message as TaskRunMessage
    app.log.info({ task: { id, name, attempt } }, 'background task starts')
  })
}

export function deadLetters () {
  const complaints = defineTask({
    name: 'complaints',
    async handler ({ task, error }: { task: string, error: string }) { await writeLog(`${task}: ${error}\n`) }
  })

  const sendInvoice = defineTask({
    name: 'send-invoice',
    retry: { attempts: 1 },
    async handler ({ order }: { order: number }) { throw new Error(`order ${order} has no address`) },
    async onFailed (_payload, error, { id, app }) {
      await app.backgroundTasks.enqueue(complaints, { task: id, error: String(error) })
    }
  })

  return { complaints, sendInvoice }
}

export function readiness (app: FastifyInstance): void {
  app.get('/ready', async (_request, reply) => {
    const { connected } = app.backgroundTasks.health()
    return await reply.code(connected ? 200 : 503).send({ connected })
  })
}

export function tellByFile (app: FastifyInstance, path: string): void {
  const tell = (): void => {
    const { connected, consuming } = app.backgroundTasks.health()
    if (connected && consuming.length > 0) writeFileSync(path, new Date().toISOString())
  }
  const timer = setInterval(tell, 1_000)
  app.addHook('onClose', async () => { clearInterval(timer) })
}

export async function processForOne (engine: TaskEngine<unknown>): Promise<FastifyInstance> {
  const worker = Fastify({ logger: true })
  await worker.register(backgroundTasks, { tasks: [sendEmail], engine, worker: { concurrency: 2 } })
  await worker.ready()   // instead of listen()
  return worker
}

export async function isEmpty (old: FastifyInstance, definition: TaskDefinition): Promise<boolean> {
  const { pending, delayed = 0, running = 0, retrying = 0 } = await old.backgroundTasks.count(definition)
  return pending + delayed + running + retrying === 0
}
