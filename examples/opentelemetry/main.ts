/**
 * Sends one request to a service with background tasks, and prints the spans. Its engine is pg-boss on a PGlite in memory, which
 * needs no server; service and worker are two apps of this process, as they would be of two.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { PGlite } from '@electric-sql/pglite'
import { SpanStatusCode } from '@opentelemetry/api'
import { InMemorySpanExporter, SimpleSpanProcessor, type ReadableSpan } from '@opentelemetry/sdk-trace'
import { pgBoss } from 'fastify-background-tasks/pg-boss'
import { fromPglite } from 'pg-boss'
import { buildApp, notifyWarehouse } from './app.js'
import { startTelemetry } from './telemetry.js'

const exporter = new InMemorySpanExporter()
const telemetry = startTelemetry({
  serviceName: 'orders', spanProcessors: [new SimpleSpanProcessor({ exporter })], metricReaders: [], logRecordProcessors: []
})
const pglite = await PGlite.create()
// pg-boss has spans of its own, of each statement: here they are in the way.
const engine = (): ReturnType<typeof pgBoss> => pgBoss({ db: fromPglite(pglite), options: { backend: 'pglite', openTelemetry: { enabled: false } } })
const service = await buildApp(telemetry, { engine: engine(), worker: false })
const worker = await buildApp(telemetry, { engine: engine() })
await worker.ready()

const address = await service.listen({ port: 0, host: '127.0.0.1' })
const reply = await fetch(`${address}/orders`, { method: 'POST' })
const { id } = await reply.json() as { id: string }
while ((await service.backgroundTasks.get(notifyWarehouse, id))?.state !== 'succeeded') await sleep(50)
await service.close()
await worker.close()
await pglite.close()

const spans = exporter.getFinishedSpans()
await telemetry.stop()
const nameOf = (spanId: string): string => spans.find(span => span.spanContext().spanId === spanId)?.name ?? spanId
for (const span of spans) console.log(describe(span))

function describe (span: ReadableSpan): string {
  const { name, parentSpanContext: parent, links, status } = span
  return [
    name.padEnd(20),
    `trace ${span.spanContext().traceId.slice(0, 8)}`,
    ...(parent === undefined ? [] : [`child of '${nameOf(parent.spanId)}'`]),
    ...links.map(link => `linked to '${nameOf(link.context.spanId)}' of trace ${link.context.traceId.slice(0, 8)}`),
    ...(status.code === SpanStatusCode.ERROR ? [`failed: ${status.message}`] : [])
  ].join('  ')
}
