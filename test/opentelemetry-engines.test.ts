// Spans across an engine: a job carries the context of its request to wherever it runs, as examples/opentelemetry has it.
import { execFile } from 'node:child_process'
import { tracingChannel } from 'node:diagnostics_channel'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { PGlite } from '@electric-sql/pglite'
import { SpanStatusCode, context, propagation, type SpanContext } from '@opentelemetry/api'
import type { FastifyRequest } from 'fastify'
import { fromPglite } from 'pg-boss'
import t, { type Test } from 'tap'
import { bullmq } from '../lib/engines/bullmq/index.js'
import { pgBoss } from '../lib/engines/pg-boss/index.js'
import { defineTask, type TaskEngine, type TaskRunMessage } from '../lib/index.js'
import { openRedis } from './support/redis.js'
import { StubEngine } from './support/stub-engine.js'
import { exporter, finished, start, tracer } from './support/traced.js'

t.setTimeout(120_000)
t.afterEach(() => { exporter.reset() })

const tenants: unknown[] = []
const notify = defineTask({
  name: 'notify',
  retry: { attempts: 2, backoff: { delay: 1 } },
  async handler (_: undefined, { attempt }) {
    tenants.push(propagation.getActiveBaggage()?.getEntry('tenant')?.value)
    tracer.startSpan(`inside of ${attempt}`).end()
    if (attempt === 1) throw new Error('once')
  }
})

function addNotify (request: FastifyRequest): void {
  const baggage = propagation.createBaggage({ tenant: { value: 'acme' } })
  context.with(propagation.setBaggage(context.active(), baggage), () => { request.backgroundTasks.addTask(notify) })
}

t.test('each attempt of a definition has a span of its own, linked to the request\'s', async t => {
  const { post } = await start(t, addNotify, { tasks: [notify] })
  await post()
  const runs = exporter.getFinishedSpans().filter(({ name }) => name === 'notify')
  t.match(runs, [
    { attributes: { 'background_task.attempt': 1 }, status: { code: SpanStatusCode.ERROR } },
    { attributes: { 'background_task.attempt': 2 }, status: { code: SpanStatusCode.UNSET } }
  ])
  for (const { links } of runs) t.same(links.map(link => link.context), [finished('POST /').spanContext()])
  t.same(finished('inside of 2').parentSpanContext, runs[1]?.spanContext())
  t.strictSame(tenants.splice(0), ['acme', 'acme'])
})

t.test('a stored job carries the span that was active when it was added, which goes on with the client\'s trace', async t => {
  const engine = new StubEngine()
  const { post, app } = await start(t, addNotify, { tasks: [notify], engine })
  const traceId = 'c0ffee00000000000000000000000001'
  await post({ traceparent: `00-${traceId}-00000000000000a1-01`, tracestate: 'vendor=1', baggage: 'client=web' })
  t.match(finished('POST /').parentSpanContext, { traceId, spanId: '00000000000000a1' })
  const added = finished('handler - answer').spanContext()
  t.equal(added.traceId, traceId)
  t.strictSame(engine.stored[0]?.[0]?.headers, { traceparent: `00-${traceId}-${added.spanId}-01`, tracestate: 'vendor=1', baggage: 'tenant=acme' })

  tracer.startActiveSpan('cron', span => {
    void app.backgroundTasks.enqueue(notify)
    span.end()
  })
  await app.backgroundTasks.idle()
  const { traceId: ofCron, spanId } = finished('cron').spanContext()
  t.strictSame(engine.stored[1]?.[0]?.headers, { traceparent: `00-${ofCron}-${spanId}-01` })
})

t.test('a job that comes without trace context has a span without links, whatever the context of its delivery', async t => {
  const engine = new StubEngine()
  await (await start(t, () => {}, { tasks: [notify], engine })).app.ready()
  await tracer.startActiveSpan('of someone else', async () => await engine.deliver({ task: 'notify', attempt: 2 }))
  t.same([finished('notify').links, finished('notify').parentSpanContext], [[], undefined])
  t.strictSame(tenants.splice(0), [undefined])
})

for (const [name, open] of Object.entries({ 'pg-boss': openPglite, BullMQ: openBullMq })) {
  t.test(`across ${name} the worker's span is linked to the service's, of which it keeps the baggage`, async t => {
    const engine = await open(t)
    if (engine === undefined) return
    const ended = new Promise<void>(resolve => {
      const { asyncEnd } = tracingChannel<unknown, TaskRunMessage>('fastify-background-tasks.run')
      const onEnd = (message: unknown): void => { if ((message as TaskRunMessage).error === undefined) resolve() }
      asyncEnd.subscribe(onEnd)
      t.teardown(() => asyncEnd.unsubscribe(onEnd))
    })
    const worker = await start(t, () => {}, { tasks: [notify], engine: engine() })
    await worker.app.ready()
    const service = await start(t, addNotify, { tasks: [notify], engine: engine(), worker: false, enqueueTimeout: 10_000 })
    await service.post()
    await ended

    const added = finished('handler - answer').spanContext()
    t.equal(added.traceId, finished('POST /').spanContext().traceId)
    const runs = exporter.getFinishedSpans().filter(({ name }) => name === 'notify')
    t.match(runs.map(({ attributes }) => attributes), [{ 'background_task.attempt': 1 }, { 'background_task.attempt': 2 }])
    for (const run of runs) {
      t.match(run.links.map(link => idsOf(link.context)), [idsOf(added)])
      t.equal(run.parentSpanContext, undefined)
      t.not(run.spanContext().traceId, added.traceId)
    }
    t.same(finished('inside of 2').parentSpanContext, runs[1]?.spanContext())
    t.strictSame(tenants.splice(0), ['acme', 'acme'])
  })
}

t.test('the example prints the spans of a request, its tasks, and its job', async t => {
  const root = fileURLToPath(new URL('..', import.meta.url))
  // `env`, for tap gives its loaders to every process that is started here, by NODE_OPTIONS.
  const { stdout } = await promisify(execFile)('env', ['-u', 'NODE_OPTIONS', process.execPath, '--import', 'tsx', 'examples/opentelemetry/main.ts'], { cwd: root })
  for (const line of [
    /^POST \/orders +trace \w{8}$/m,
    /^handler - takeOrder +trace \w{8} {2}child of 'POST \/orders'$/m,
    /^sendReceipt +trace \w{8} {2}linked to 'POST \/orders' of trace \w{8}$/m,
    /^updateStock +trace \w{8} {2}linked to 'POST \/orders' of trace \w{8} {2}failed: nothing left in stock$/m,
    /^notify-warehouse +trace \w{8} {2}linked to 'handler - takeOrder' of trace \w{8}$/m,
    /^call the warehouse +trace \w{8} {2}child of 'notify-warehouse'$/m
  ]) t.match(stdout, line)
})

function idsOf ({ traceId, spanId }: SpanContext): { traceId: string, spanId: string } {
  return { traceId, spanId }
}

/** @returns a function that makes adapters to one place, which is gone at the end of the test */
async function openPglite (t: Test): Promise<() => TaskEngine<never>> {
  const pglite = await PGlite.create()
  t.teardown(() => pglite.close())
  return () => pgBoss({ db: fromPglite(pglite), options: { backend: 'pglite' } })
}

/** The same on Redis, if that is there. */
async function openBullMq (t: Test): Promise<(() => TaskEngine<never>) | undefined> {
  const redis = await openRedis(t)
  return redis && (() => bullmq(redis))
}
