import { setTimeout as sleep } from 'node:timers/promises'
import { Type } from '@sinclair/typebox'
import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
import backgroundTasks, { defineTask } from 'fastify-background-tasks'
import { Registry } from 'prom-client'
import { taskMetrics } from './task-metrics.js'

/** Fails now and then, and is tried again. */
const notifyWarehouse = defineTask({
  name: 'notify-warehouse',
  payload: Type.Object({ order: Type.String() }),
  retry: { attempts: 3, backoff: { delay: 50 } },
  async handler (_payload, { attempt }) {
    if (attempt === 1) throw new Error('the warehouse does not answer')
  }
})

/** Fails for good. */
const updateSearch = defineTask({
  name: 'update-search',
  payload: Type.Object({ order: Type.String() }),
  retry: { attempts: 2, backoff: { delay: 50 } },
  async handler () { throw new Error('the index is read-only') }
})

/** Takes its time. */
async function sendReceipt (_order: string): Promise<void> {
  await sleep(200)
}

function countOrder (_order: string): void {}

/** A shop: `POST /orders`, `DELETE /orders/:id`, which refuses and so skips its task, and `GET /metrics`. */
export async function buildApp (logger: FastifyServerOptions['logger'] = false): Promise<FastifyInstance> {
  const app = Fastify({ logger })
  const definitions = [notifyWarehouse, updateSearch]
  await app.register(backgroundTasks, { tasks: definitions })
  // One of its own: the shop can be started twice in one process, as its test does.
  await app.register(taskMetrics, { registry: new Registry(), definitions })

  app.post('/orders', async (request, reply) => {
    const order = request.id
    request.backgroundTasks.addTask(countOrder, order)
    request.backgroundTasks.addTask(sendReceipt, order)
    request.backgroundTasks.addTask(notifyWarehouse, { order })
    request.backgroundTasks.addTask(updateSearch, { order })
    return await reply.code(202).send({ order })
  })

  app.delete<{ Params: { id: string } }>('/orders/:id', async request => {
    request.backgroundTasks.addTask(sendReceipt, request.params.id)
    throw Object.assign(new Error('it is on its way'), { statusCode: 409 })
  })

  return app
}
