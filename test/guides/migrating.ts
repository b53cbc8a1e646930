/** The code of docs/migrating.md: what was written by hand, and what takes its place. */
import { Type } from '@sinclair/typebox'
import { Queue, Worker } from 'bullmq'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import { bullmq } from '../../lib/engines/bullmq/index.js'
import backgroundTasks, { defineTask } from '../../lib/index.js'

/** What the routes need. */
export interface Shop {
  saveOrder: (order: { email: string }) => Promise<{ id: string }>
  sendMail: (to: string, subject?: string) => Promise<void>
  audit: (requestId: string, statusCode: number | undefined) => Promise<void>
}

export async function onResponseBefore (app: FastifyInstance, { saveOrder, sendMail }: Shop): Promise<void> {
  app.post<{ Body: { email: string } }>('/orders', {
    async onResponse (request, reply) {
      if (reply.statusCode === 201) await sendMail(request.body.email)
    }
  }, async (request, reply) => {
    const { id } = await saveOrder(request.body)
    return await reply.code(201).send({ id })
  })
}

/** In place of the hook, and of `setImmediate`. */
export async function after (app: FastifyInstance, { saveOrder, sendMail }: Shop): Promise<void> {
  app.post<{ Body: { email: string } }>('/orders', async (request, reply) => {
    const { id } = await saveOrder(request.body)
    request.backgroundTasks.addTask(sendMail, request.body.email)
    return await reply.code(201).send({ id })
  })
}

export async function auditAfter (app: FastifyInstance, { audit }: Shop): Promise<void> {
  app.addHook('onRequest', async request => {
    request.backgroundTasks.with({ when: 'always' }).addTask(auditRequest, request)
  })

  async function auditRequest (request: FastifyRequest): Promise<void> {
    await audit(request.id, request.backgroundTasks.outcome?.statusCode)
  }
}

export async function setImmediateBefore (app: FastifyInstance, { saveOrder, sendMail }: Shop): Promise<void> {
  app.post<{ Body: { email: string } }>('/orders', async (request, reply) => {
    const { id } = await saveOrder(request.body)
    setImmediate(async () => { await sendMail(request.body.email) })
    return await reply.code(201).send({ id })
  })
}

export function queueBefore (connection: object, prefix: string, { sendMail }: Shop): { emails: Queue, worker: () => Worker } {
  const emails = new Queue('send-email', { connection, prefix })
  const worker = (): Worker => new Worker('send-email', async job => { await sendMail(job.data.to, job.data.subject) }, { connection, prefix })
  return { emails, worker }
}

export async function bullmqBefore (app: FastifyInstance, { saveOrder }: Shop, emails: Queue): Promise<void> {
  app.post<{ Body: { email: string } }>('/orders', async (request, reply) => {
    const { id } = await saveOrder(request.body)
    await emails.add('send-email', { to: request.body.email, subject: 'Your order' }, { attempts: 5 })
    return await reply.code(201).send({ id })
  })
}

export async function bullmqAfter (app: FastifyInstance, { saveOrder, sendMail }: Shop, connection: string, prefix: string): Promise<void> {
  const sendEmail = defineTask({
    name: 'send-email',
    payload: Type.Object({ to: Type.String(), subject: Type.String() }),
    retry: { attempts: 5 },
    async handler ({ to, subject }) {
      await sendMail(to, subject)
    }
  })

  await app.register(backgroundTasks, { tasks: [sendEmail], engine: bullmq({ connection, prefix }) })

  app.post<{ Body: { email: string } }>('/orders', async (request, reply) => {
    const { id } = await saveOrder(request.body)
    request.backgroundTasks.addTask(sendEmail, { to: request.body.email, subject: 'Your order' })
    return await reply.code(201).send({ id })
  })
}
