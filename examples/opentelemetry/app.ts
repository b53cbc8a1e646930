import { Type } from '@sinclair/typebox'
import { trace } from '@opentelemetry/api'
import Fastify, { type FastifyInstance } from 'fastify'
import backgroundTasks, { defineTask, type FastifyBackgroundTasksOptions } from 'fastify-background-tasks'
import type { Telemetry } from './telemetry.js'

const tracer = trace.getTracer('orders')

/** Runs where the engine has it run. */
export const notifyWarehouse = defineTask({
  name: 'notify-warehouse',
  payload: Type.Object({ order: Type.String() }),
  async handler () {
    await tracer.startActiveSpan('call the warehouse', async span => { span.end() })
  }
})

async function sendReceipt (): Promise<void> {
  await tracer.startActiveSpan('render receipt', async span => { span.end() })
}

async function updateStock (): Promise<void> {
  throw new Error('nothing left in stock')
}

/** `POST /orders` has two functions run here, and one task of a definition wherever the options say. */
export async function buildApp ({ requests }: Telemetry, placement: FastifyBackgroundTasksOptions = {}): Promise<FastifyInstance> {
  const app = Fastify({ logger: { level: 'fatal' } })
  await app.register(requests)
  await app.register(backgroundTasks, { tasks: [notifyWarehouse], ...placement })

  app.post('/orders', async function takeOrder (request, reply) {
    request.backgroundTasks.addTask(sendReceipt)
    request.backgroundTasks.addTask(updateStock)
    const { id } = request.backgroundTasks.addTask(notifyWarehouse, { order: request.id })
    return await reply.code(202).send({ id })
  })
  return app
}
