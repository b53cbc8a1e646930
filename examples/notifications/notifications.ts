/** The route of FastAPI's tutorial, https://fastapi.tiangolo.com/tutorial/background-tasks/, and its dependency. */
import { Type, type FastifyPluginAsyncTypebox, type Static } from '@fastify/type-provider-typebox'
import type { FastifyRequest } from 'fastify'
import { writeLog } from './log-file.js'
import type { Mailer } from './mail.js'

export interface NotificationsOptions {
  mailer: Mailer
  /** Path of the file that the log lines are appended to. */
  logFile: string
}

const Params = Type.Object({
  email: Type.String({ format: 'email', description: 'Who is notified' })
})

const Query = Type.Object({
  q: Type.Optional(Type.String({ maxLength: 200, description: 'Noted in the log file' }))
})

const Accepted = Type.Object({ message: Type.String() }, { description: 'The mail goes out in the background' })

const Refused = Type.Object({
  statusCode: Type.Integer(), code: Type.String(), error: Type.String(), message: Type.String()
}, { description: 'Not an email address, or too long a query' })

export const notifications: FastifyPluginAsyncTypebox<NotificationsOptions> = async (app, { mailer, logFile }) => {
  const schema = {
    tags: ['notifications'],
    summary: 'Notify somebody by mail',
    params: Params,
    querystring: Query,
    response: { 202: Accepted, 400: Refused }
  }

  /** A dependency adds tasks as a route does, and before it. */
  async function getQuery (request: FastifyRequest<{ Querystring: Static<typeof Query> }>): Promise<void> {
    const { q } = request.query
    if (q !== undefined) request.backgroundTasks.addTask(writeLog, logFile, `found query: ${q}`)
  }

  app.post('/send-notification/:email', { schema, preHandler: getQuery }, async (request, reply) => {
    const { email } = request.params
    const { q = 'nothing in particular' } = request.query
    request.backgroundTasks.addTask(mailer.sendMail, {
      to: email,
      subject: 'Some notification',
      text: `Hello ${email},\nyou asked for: ${q}.`
    })
    request.backgroundTasks.addTask(writeLog, logFile, `notification for ${email}`)
    return reply.code(202).send({ message: 'Notification sent in the background' })
  })
}
