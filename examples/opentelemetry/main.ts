/**
 * Sends one request to a service with background tasks, and prints the spans. Its engine is pg-boss on a PGlite in memory, which
 * needs no server. Service and worker are two apps of this process, as they would be of two.
 *
 * With PORT it goes on serving, and prints the spans of each request. HOST (127.0.0.1).
 */
import { setTimeout as sleep } from 'node:timers/promises'
import { PGlite } from '@electric-sql/pglite'
import { SpanStatusCode } from '@opentelemetry/api'
import { InMemorySpanExporter, SimpleSpanProcessor, type ReadableSpan } from '@opentelemetry/sdk-trace'
import closeWithGrace from 'close-with-grace'
import { pgBoss } from 'fastify-background-tasks/pg-boss'
import { fromPglite } from 'pg-boss'
import { printBlock } from '../notifications/print.js'
import { buildApp, notifyWarehouse } from './app.js'
import { startTelemetry } from './telemetry.js'

/** Milliseconds without another span after which spans are printed. */
const QUIET_MS = 300
const { PORT, HOST = '127.0.0.1' } = process.env
let lengthBefore = 0
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

const address = await service.listen({ port: Number(PORT ?? 0), host: HOST })
const reply = await fetch(`${address}/orders`, { method: 'POST' })
const { id } = await reply.json() as { id: string }
while ((await service.backgroundTasks.get(notifyWarehouse, id))?.state !== 'succeeded') await sleep(50)

const HINTS = [
  'To copy: examples/opentelemetry/telemetry.ts and task-spans.ts',
  'In your own app, OTEL_EXPORTER_OTLP_ENDPOINT and the other OTEL_* variables say where spans go. This example prints them.'
]
if (PORT === undefined) {
  await close()
  printSpans()
  await telemetry.stop()
  printBlock('Your turn', [
    '# A service that goes on, and prints the spans of each request:',
    'PORT=3000 npm run example:opentelemetry',
    '# Then, in another terminal:',
    'curl -X POST http://127.0.0.1:3000/orders',
    '',
    ...HINTS
  ])
} else {
  closeWithGrace(async () => {
    await close()
    await telemetry.stop()
  })
  setInterval(printSpansOnceQuiet, QUIET_MS).unref()
  await sleep(3 * QUIET_MS)
  printBlock('Your turn', [
    '# Its spans are printed here:',
    `curl -X POST ${address}/orders`,
    '# This client has a trace of its own:',
    `curl -X POST ${address}/orders -H 'traceparent: 00-c0ffee00000000000000000000000001-00000000000000a1-01'`,
    '',
    ...HINTS,
    'PORT, HOST   where it listens. Without PORT it ends after one request.',
    '',
    'Ctrl+C stops the service once its background tasks are done.'
  ])
}

async function close (): Promise<void> {
  await service.close()
  await worker.close()
  await pglite.close()
}

/** A span names its parent, which ends later: so no span is printed before all have ended. */
function printSpansOnceQuiet (): void {
  const { length } = exporter.getFinishedSpans()
  if (length > 0 && length === lengthBefore) printSpans()
  lengthBefore = length
}

function printSpans (): void {
  const spans = exporter.getFinishedSpans()
  exporter.reset()
  for (const span of spans) console.log(describe(span, spans))
  console.log()
}

function describe (span: ReadableSpan, spans: readonly ReadableSpan[]): string {
  const nameOf = (spanId: string): string => spans.find(span => span.spanContext().spanId === spanId)?.name ?? spanId
  const { name, parentSpanContext: parent, links, status } = span
  return [
    name.padEnd(20),
    `trace ${span.spanContext().traceId.slice(0, 8)}`,
    ...(parent === undefined ? [] : [`child of '${nameOf(parent.spanId)}'`]),
    ...links.map(link => `linked to '${nameOf(link.context.spanId)}' of trace ${link.context.traceId.slice(0, 8)}`),
    ...(status.code === SpanStatusCode.ERROR ? [`failed: ${status.message}`] : [])
  ].join('  ')
}
