import swagger from '@fastify/swagger'
import swaggerUi from '@fastify/swagger-ui'
import { Type } from '@sinclair/typebox'
import type { TypeBoxTypeProvider } from '@fastify/type-provider-typebox'
import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
import backgroundTasks, { type FastifyBackgroundTasksOptions } from 'fastify-background-tasks'
import { makeReport as declaration } from './declarations.js'
import type definition from './reports.js'

const TaskRecord = Type.Object({
  id: Type.String({ format: 'uuid' }),
  name: Type.String(),
  state: Type.Union(['pending', 'delayed', 'running', 'retrying', 'succeeded', 'failed', 'skipped', 'abandoned'].map(state => Type.Literal(state))),
  attempt: Type.Integer({ description: 'Starts so far' }),
  enqueuedAt: Type.String({ format: 'date-time' }),
  startedAt: Type.Optional(Type.String({ format: 'date-time' })),
  finishedAt: Type.Optional(Type.String({ format: 'date-time' })),
  error: Type.Optional(Type.Object({ name: Type.String(), message: Type.String(), code: Type.Optional(Type.String()) })),
  result: Type.Optional(Type.Object({ file: Type.String(), pages: Type.Integer() }))
})
const Order = Type.Object({ title: Type.String({ minLength: 1 }), pages: Type.Integer({ minimum: 1, maximum: 100, default: 5 }) })
const Accepted = Type.Object({ id: Type.String({ format: 'uuid' }) }, { description: 'Stored. Its state is at Location' })

const NotSupported = Type.Object({ message: Type.String() }, { description: 'The placement of tasks cannot do that' })

/** Where tasks go is the caller's to say: nothing here depends on it. */
export type Placement = Pick<FastifyBackgroundTasksOptions, 'engine' | 'worker'>

/**
 * `POST /reports` answers 202 with the id of a task, and `GET /tasks/:id` tells what has become of it; docs at `/docs`. What
 * the placement cannot do is a 501. `POST /reports/soon` answers 200 with the report if it is there within 300 ms, and 202 if not.
 */
export async function buildApp (placement: Placement, logger: FastifyServerOptions['logger'] = false): Promise<FastifyInstance> {
  const supports = placement.engine?.supports ?? { key: true, get: true }
  const app = Fastify({ logger }).withTypeProvider<TypeBoxTypeProvider>()
  await app.register(swagger, { openapi: { info: { title: 'Reports', version: '1.0.0' } } })
  await app.register(swaggerUi, { routePrefix: '/docs' })
  // A web process beside separate workers does not load what they need.
  const onlyStores = placement.engine !== undefined && placement.worker === false
  // They are the same task. The type of the result is that of the definition, and the import of a type loads nothing.
  const makeReport = (onlyStores ? declaration : (await import('./reports.js')).default) as typeof definition
  await app.register(backgroundTasks, { tasks: [makeReport], ...placement })

  app.post('/reports', {
    schema: {
      summary: 'Order a report',
      headers: Type.Object({ 'idempotency-key': Type.Optional(Type.String({ minLength: 1 })) }),
      body: Order,
      response: {
        202: Accepted,
        501: NotSupported
      }
    }
  }, async (request, reply) => {
    const key = request.headers['idempotency-key']
    if (key !== undefined && !supports.key) return await reply.code(501).send({ message: 'repeated orders cannot be told here' })
    const { id } = request.backgroundTasks.addTask(makeReport, request.body, { key })
    if (supports.get) reply.header('location', `/tasks/${id}`)
    return await reply.code(202).send({ id })
  })

  app.post('/reports/soon', {
    schema: {
      summary: 'Order a report, and wait 300 ms for it',
      body: Order,
      response: { 200: Type.Object({ file: Type.String(), pages: Type.Integer() }, { description: 'The report is there' }), 202: Accepted }
    }
  }, async (request, reply) => {
    // A task of addTask would be stored with the reply, and this reply waits for the task.
    const { id } = await app.backgroundTasks.enqueue(makeReport, request.body)
    const record = supports.get ? await app.backgroundTasks.result(makeReport, id, { timeout: 300 }) : undefined
    if (record?.state === 'succeeded' && record.result !== undefined) return record.result
    if (supports.get) reply.header('location', `/tasks/${id}`)
    return await reply.code(202).send({ id })
  })

  app.get('/tasks/:id', {
    schema: {
      summary: 'What has become of it',
      params: Type.Object({ id: Type.String({ format: 'uuid' }) }),
      response: { 200: TaskRecord, 404: Type.Object({ message: Type.String() }), 501: NotSupported }
    }
  }, async (request, reply) => {
    if (!supports.get) return await reply.code(501).send({ message: 'what has become of a task is not kept here' })
    const record = await app.backgroundTasks.get(makeReport, request.params.id)
    return record ?? await reply.code(404).send({ message: 'no such task, or its record has gone' })
  })

  return app
}
