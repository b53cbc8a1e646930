/** The code of docs/changing-definitions.md: one definition in several states of its life. */
import { Type, type Static } from '@sinclair/typebox'
import type { FastifyInstance } from 'fastify'
import backgroundTasks, { defineTask, type TaskEngine } from '../../lib/index.js'

/** What was sent. */
export const outbox: unknown[] = []

async function sendMail (mail: { to: string[], subject: string, locale?: string }): Promise<void> {
  outbox.push(mail)
}

export function before () {
  const sendEmail = defineTask({
    name: 'send-email',
    payload: Type.Object({ to: Type.String(), subject: Type.String() }),
    async handler ({ to, subject }) {
      await sendMail({ to: [to], subject })
    }
  })
  return sendEmail
}

export function withAnotherField () {
  const sendEmail = defineTask({
    name: 'send-email',
    payload: Type.Object({ to: Type.String(), subject: Type.String(), locale: Type.Optional(Type.String()) }),
    async handler ({ to, subject, locale = 'en' }) {
      await sendMail({ to: [to], subject, locale })
    }
  })
  return sendEmail
}

const Version1 = Type.Object({ version: Type.Optional(Type.Literal(1)), to: Type.String(), subject: Type.String() })
const Version2 = Type.Object({ version: Type.Literal(2), recipients: Type.Array(Type.String()), subject: Type.String() })

export function withVersions () {
  const sendEmail = defineTask({
    name: 'send-email',
    payload: Type.Union([Version1, Version2]),
    async handler (payload) {
      const { recipients, subject } = toVersion2(payload)
      await sendMail({ to: recipients, subject })
    }
  })
  return sendEmail
}

function toVersion2 (payload: Static<typeof Version1> | Static<typeof Version2>): Static<typeof Version2> {
  return payload.version === 2 ? payload : { version: 2, recipients: [payload.to], subject: payload.subject }
}

export async function withAnotherName (app: FastifyInstance, engine: TaskEngine<unknown>) {
  const sendEmail = defineTask({
    name: 'send-email',
    payload: Type.Object({ to: Type.String(), subject: Type.String() }),
    async handler ({ to, subject }) {
      await sendMail({ to: [to], subject })
    }
  })

  const sendEmail2 = defineTask({
    name: 'send-email-2',
    payload: Type.Object({ recipients: Type.Array(Type.String()), subject: Type.String() }),
    async handler ({ recipients, subject }) {
      await sendMail({ to: recipients, subject })
    }
  })

  await app.register(backgroundTasks, { tasks: [sendEmail, sendEmail2], engine })
  return { sendEmail, sendEmail2 }
}

export async function renamed (app: FastifyInstance, engine: TaskEngine<unknown>) {
  const mail = {
    payload: Type.Object({ to: Type.String(), subject: Type.String() }),
    async handler ({ to, subject }: { to: string, subject: string }) {
      await sendMail({ to: [to], subject })
    }
  }
  const notify = defineTask({ name: 'notify', ...mail })
  const sendEmail = defineTask({ name: 'send-email', ...mail })   // until its queue is empty

  await app.register(backgroundTasks, { tasks: [notify, sendEmail], engine })

  app.get<{ Params: { id: string } }>('/tasks/:id', async (request, reply) => {
    const { id } = request.params
    const record = await app.backgroundTasks.get(notify, id) ?? await app.backgroundTasks.get(sendEmail, id)
    return record ?? await reply.code(404).send({ message: 'no such task' })
  })
  return { notify, sendEmail }
}
