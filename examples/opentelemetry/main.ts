/** Sends one request to a service with background tasks, and prints the spans: `tsx examples/opentelemetry/main.ts` */
import { SpanStatusCode, context, trace } from '@opentelemetry/api'
import { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import { BasicTracerProvider, InMemorySpanExporter, SimpleSpanProcessor, type ReadableSpan } from '@opentelemetry/sdk-trace-base'
import Fastify from 'fastify'
import backgroundTasks from 'fastify-background-tasks'
import { traceRequests } from './request-spans.js'
import { traceTasks } from './task-spans.js'

const exporter = new InMemorySpanExporter()
trace.setGlobalTracerProvider(new BasicTracerProvider({ spanProcessors: [new SimpleSpanProcessor(exporter)] }))
const contextManager = new AsyncLocalStorageContextManager()
context.setGlobalContextManager(contextManager)
const tracer = trace.getTracer('orders')

const app = Fastify({ logger: { level: 'fatal' } })
await app.register(backgroundTasks)
traceTasks({ tracer, contextManager, spanOf: traceRequests(app, tracer) })

async function sendReceipt (): Promise<void> {
  await tracer.startActiveSpan('render receipt', async span => { span.end() })
}

async function updateStock (): Promise<void> {
  throw new Error('nothing left in stock')
}

app.post('/orders', async (request, reply) => {
  request.backgroundTasks.addTask(sendReceipt)
  request.backgroundTasks.addTask(updateStock)
  return reply.code(202).send({ message: 'Order taken' })
})

const address = await app.listen({ port: 0, host: '127.0.0.1' })
await fetch(`${address}/orders`, { method: 'POST' })
await app.backgroundTasks.idle()
await app.close()

const spans = exporter.getFinishedSpans()
const nameOf = (spanId: string): string => spans.find(span => span.spanContext().spanId === spanId)?.name ?? spanId
for (const span of spans) console.log(describe(span))

function describe (span: ReadableSpan): string {
  const { name, parentSpanContext: parent, links, status } = span
  return [
    name.padEnd(15),
    `trace ${span.spanContext().traceId.slice(0, 8)}`,
    ...(parent === undefined ? [] : [`child of '${nameOf(parent.spanId)}'`]),
    ...links.map(link => `linked to '${nameOf(link.context.spanId)}' of trace ${link.context.traceId.slice(0, 8)}`),
    ...(status.code === SpanStatusCode.ERROR ? [`failed: ${status.message}`] : [])
  ].join('  ')
}
