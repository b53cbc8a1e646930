/** The code of docs/recipes.md on a report that is rendered in a thread. */
import { createReadStream } from 'node:fs'
import { Type } from '@sinclair/typebox'
import Fastify, { type FastifyInstance } from 'fastify'
import { Piscina } from 'piscina'
import backgroundTasks, { defineTask } from '../../lib/index.js'

const renderReport = defineTask({
  name: 'render-report',
  payload: Type.Object({ source: Type.String(), folder: Type.String() }),
  file: new URL('./render-report.js', import.meta.url)
})

/** @param source a file of comma-separated values */
export async function reports (source: string, folder: string): Promise<FastifyInstance> {
  const app = Fastify()
  const threads = new Piscina({ maxThreads: 2 })
  await app.register(backgroundTasks, { tasks: [renderReport], threads, concurrency: 2 })
  app.addHook('onClose', async () => { await threads.destroy() })

  app.post('/reports', async (request, reply) => {
    const { id } = request.backgroundTasks.addTask(renderReport, { source, folder })
    return await reply.code(202).header('location', `/reports/${id}`).send({ id })
  })

  app.get<{ Params: { id: string } }>('/reports/:id', async (request, reply) => {
    const record = await app.backgroundTasks.get(renderReport, request.params.id)
    if (record === undefined) return await reply.code(404).send()
    if (record.state !== 'succeeded') return { state: record.state }
    const { path } = record.result as { path: string }
    return await reply.type('text/html').header('content-encoding', 'gzip').send(createReadStream(path))
  })
  return app
}
