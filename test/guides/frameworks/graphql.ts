/** The code of docs/frameworks.md on GraphQL. */
import Fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import mercurius, { type PubSub } from 'mercurius'
import { addTask } from '../../../lib/ambient.js'
import backgroundTasks, { type ExchangeOutcome } from '../../../lib/index.js'
import { writeLog } from './journal.js'

async function saveOrder (email: string): Promise<void> {
  if (email === '') throw new Error('nobody orders')
}

const schema = `
  type Query { ok: Int }
  type Mutation { order(email: String!): ID, orderAmbient(email: String!): ID, orderStrict(email: String!): ID }
  type Subscription { ordered: String }
`

interface Context { reply: FastifyReply, pubsub: PubSub }

const resolvers = {
  Query: { ok: () => 1 },
  Mutation: {
    async order (_: unknown, { email }: { email: string }, { reply, pubsub }: Context) {
      await saveOrder(email)                                   // if this fails, there is no task
      reply.request.backgroundTasks.addTask(writeLog, `ordered by ${email}\n`)
      pubsub.publish({ topic: 'ordered', payload: { ordered: email } })
      return '17'
    },
    async orderAmbient (_: unknown, { email }: { email: string }) {
      await saveOrder(email)
      addTask(writeLog, `ordered by ${email}\n`)
      return '17'
    },
    async orderStrict (_: unknown, { email }: { email: string }, { reply }: Context) {
      reply.request.backgroundTasks.with({ when: withoutErrors(reply.request) }).addTask(writeLog, `ordered by ${email}\n`)
      await saveOrder(email)
      return '17'
    }
  },
  Subscription: {
    ordered: {
      async subscribe (_: unknown, __: unknown, { reply, pubsub }: Context) {
        reply.request.backgroundTasks.addTask(writeLog, 'somebody listens\n')
        return await pubsub.subscribe('ordered')
      },
      resolve ({ ordered }: { ordered: string }) {
        addTask(writeLog, `told that ${ordered} has ordered\n`)
        return ordered
      }
    }
  }
}

const hasErrors = new WeakSet<FastifyRequest>()

const withoutErrors = (request: FastifyRequest) => ({ failed }: ExchangeOutcome) => !failed && !hasErrors.has(request)

/** A server of the schema. */
export async function shop (): Promise<FastifyInstance> {
  const app = Fastify()
  await app.register(backgroundTasks, { ambient: true })
  await app.register(mercurius, { schema, resolvers, subscription: true, allowBatchedQueries: true })

  app.graphql.addHook('onResolution', async ({ errors = [] }, { reply }) => {
    if (errors.length > 0) hasErrors.add(reply.request)
  })
  return app
}
