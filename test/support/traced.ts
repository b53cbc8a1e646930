import { trace } from '@opentelemetry/api'
import { InMemorySpanExporter, SimpleSpanProcessor, type ReadableSpan } from '@opentelemetry/sdk-trace'
import Fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import type { Test } from 'tap'
import { startTelemetry } from '../../examples/opentelemetry/telemetry.js'
import backgroundTasks, { type FastifyBackgroundTasksOptions } from '../../lib/index.js'

/** The spans of this process, as the example of OpenTelemetry makes them. */
export const exporter = new InMemorySpanExporter()
export const telemetry = startTelemetry({
  spanProcessors: [new SimpleSpanProcessor({ exporter })],
  metricReaders: [],
  logRecordProcessors: [],
  // The first spans would wait for them, and the order would be another one.
  autoDetectResources: false
})
export const tracer = trace.getTracer('test')

export interface Traced {
  app: FastifyInstance
  address: string
  /** A request with a body; resolves when its tasks have ended here. */
  post: (headers?: Record<string, string>) => Promise<void>
}

/** A traced app whose one route, `POST /`, does this and answers. */
export async function start (t: Test, handle: (request: FastifyRequest, reply: FastifyReply) => unknown, options: FastifyBackgroundTasksOptions = {}): Promise<Traced> {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(telemetry.requests)
  await app.register(backgroundTasks, options)
  app.post('/', async function answer (request, reply) {
    await handle(request, reply)
    return { active: trace.getActiveSpan()?.spanContext().spanId }
  })
  const address = await app.listen({ port: 0, host: '127.0.0.1' })
  return {
    app,
    address,
    async post (headers = {}) {
      const response = await fetch(address, { method: 'POST', body: '{"a":1}', headers: { 'content-type': 'application/json', ...headers } })
      const { active } = await response.json() as { active: string }
      await app.backgroundTasks.idle()
      t.equal(active, finished('handler - answer').spanContext().spanId, 'the handler\'s span is active in it')
      t.same(finished('handler - answer').parentSpanContext, finished('POST /').spanContext())
    }
  }
}

/** The names of the spans that have ended, first ended first. */
export function names (): string[] {
  return exporter.getFinishedSpans().map(span => span.name)
}

export function finished (name: string): ReadableSpan {
  const [span, ...others] = exporter.getFinishedSpans().filter(span => span.name === name)
  if (span === undefined || others.length > 0) throw new Error(`expected one span '${name}' of: ${names().join(', ')}`)
  return span
}
