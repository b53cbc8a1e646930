// The channels carry OpenTelemetry: what examples/opentelemetry says of it holds.
import { channel, tracingChannel } from 'node:diagnostics_channel'
import { request as httpRequest } from 'node:http'
import { SpanStatusCode, context, propagation, trace } from '@opentelemetry/api'
import type { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import { Piscina } from 'piscina'
import t from 'tap'
import { traceTasks } from '../examples/opentelemetry/task-spans.js'
import { defineTask } from '../lib/index.js'
import { exporter, finished, names, start, telemetry, tracer } from './support/traced.js'

t.afterEach(() => { exporter.reset() })

t.test('a task\'s span is linked to its request\'s, which has ended, and is not its child', async t => {
  const { post } = await start(t, request => {
    request.backgroundTasks.addTask(async function sendReceipt () { await Promise.resolve() })
  })
  await post()

  t.same(names(), ['handler - answer', 'POST /', 'sendReceipt'], 'in the order in which they ended')
  const [request, task] = [finished('POST /'), finished('sendReceipt')]
  t.same(task.links.map(link => link.context), [request.spanContext()])
  t.equal(task.parentSpanContext, undefined)
  t.not(task.spanContext().traceId, request.spanContext().traceId)
  t.equal(task.status.code, SpanStatusCode.UNSET)
  t.match(task.attributes, { 'background_task.id': /^[\da-f-]{36}$/, 'background_task.queued_ms': Number })
})

t.test('spans made inside a task are its children, before and after it has waited', async t => {
  const { post } = await start(t, request => {
    request.backgroundTasks.addTask(async function sendReceipt () {
      tracer.startSpan('render').end()
      await new Promise(resolve => { setImmediate(resolve) })
      tracer.startSpan('deliver').end()
    })
    request.backgroundTasks.addTask(function updateStock () { tracer.startSpan('query').end() })
  })
  await post()

  for (const [child, task] of [['render', 'sendReceipt'], ['deliver', 'sendReceipt'], ['query', 'updateStock']] as const) {
    t.same(finished(child).parentSpanContext, finished(task).spanContext(), `${child} in ${task}`)
  }
  t.same(finished('updateStock').links.map(link => link.context), [finished('POST /').spanContext()])
})

t.test('a task that fails has a span with the error, and the next one none of it', async t => {
  const { post } = await start(t, request => {
    request.backgroundTasks.addTask(function throws () { throw new Error('at once') })
    request.backgroundTasks.addTask(async function rejects () { throw new Error('later') })
    request.backgroundTasks.addTask(async function throwsNoError () { throw 'a string' }) // eslint-disable-line no-throw-literal
    request.backgroundTasks.with({ timeout: 1 }).addTask(async function hangs () { await new Promise(() => {}) })
    request.backgroundTasks.addTask(function succeeds () {})
  })
  await post()

  t.same(names(), ['handler - answer', 'POST /', 'throws', 'rejects', 'throwsNoError', 'hangs', 'succeeds'], 'each ended once')
  t.match(names().slice(2).map(name => finished(name).status), [
    { code: SpanStatusCode.ERROR, message: 'at once' },
    { code: SpanStatusCode.ERROR, message: 'later' },
    { code: SpanStatusCode.ERROR, message: 'a string' },
    { code: SpanStatusCode.ERROR, message: '1 ms' },
    { code: SpanStatusCode.UNSET }
  ])
  t.match(finished('rejects').events, [{ name: 'exception', attributes: { 'exception.message': 'later' } }])
})

t.test('a task keeps the baggage of its `addTask` call', async t => {
  let tenant: string | undefined
  const { post } = await start(t, request => {
    const baggage = propagation.createBaggage({ tenant: { value: 'acme' } })
    context.with(propagation.setBaggage(context.active(), baggage), () => {
      request.backgroundTasks.addTask(() => { tenant = propagation.getActiveBaggage()?.getEntry('tenant')?.value })
    })
  })
  await post()
  t.equal(tenant, 'acme')
})

t.test('a task of the app is linked to the span that was active when it was added, if any', async t => {
  const { app } = await start(t, () => {})
  tracer.startActiveSpan('cron', span => {
    app.backgroundTasks.addTask(function cleanUp () {})
    span.end()
  })
  app.backgroundTasks.addTask(function alone () {})
  await app.backgroundTasks.idle()

  t.same(finished('cleanUp').links.map(link => link.context), [finished('cron').spanContext()])
  t.equal(finished('cleanUp').parentSpanContext, undefined)
  t.same(finished('alone').links, [])
})

t.test('a task with a file has the span of a task, around its run in a thread, and the file has the span of the handler in its headers', async t => {
  interface Work { do?: string }
  const file = new URL('support/threads/work.js', import.meta.url)
  const succeeds = defineTask<Work>({ name: 'succeeds', file })
  const fails = defineTask<Work>({ name: 'fails', file, retry: { attempts: 2, backoff: { delay: 1 } } })
  const threads = new Piscina({ maxThreads: 1 })
  t.teardown(() => threads.destroy())
  const ids: string[] = []
  const { app, post } = await start(t, ({ backgroundTasks }) => {
    ids.push(backgroundTasks.addTask(succeeds, {}).id, backgroundTasks.addTask(fails, { do: 'throw' }).id)
  }, { tasks: [succeeds, fails], threads })
  await post()

  const [request, handler, task] = [finished('POST /'), finished('handler - answer'), finished('succeeds')]
  t.same(task.links.map(link => link.context), [request.spanContext()])
  t.equal(task.parentSpanContext, undefined)
  t.equal(task.status.code, SpanStatusCode.UNSET)
  t.match(task.attributes, { 'background_task.id': ids[0], 'background_task.attempt': 1 })
  const { traceId, spanId } = handler.spanContext()
  const record = await app.backgroundTasks.get(succeeds, ids[0] as string)
  t.match(record, { result: { context: { headers: { traceparent: `00-${traceId}-${spanId}-01` } } } })
  t.equal(names().filter(name => name === 'fails').length, 2)
  t.match(exporter.getFinishedSpans().filter(({ name }) => name === 'fails'), [1, 2].map(attempt => ({
    attributes: { 'background_task.id': ids[1], 'background_task.attempt': attempt },
    status: { code: SpanStatusCode.ERROR, message: 'no' }
  })))
})

t.test('a request whose client disconnects has a span too, and its task is linked to it', async t => {
  let arrived = (): void => {}
  const handling = new Promise<void>(resolve => { arrived = resolve })
  const { app, address } = await start(t, async (request, reply) => {
    request.backgroundTasks.addTask(function sendReceipt () {})
    const gone = new Promise(resolve => { reply.raw.once('close', resolve) })
    arrived()
    await gone
  })
  // Not `fetch`: it connects again after an abort, and `close()` would wait for that connection.
  const client = httpRequest(address, { method: 'POST', agent: false }).on('error', () => {}).end()
  await handling
  client.destroy()
  await app.backgroundTasks.idle()
  t.same(finished('sendReceipt').links.map(link => link.context), [finished('POST /').spanContext()])
})

t.test('a context manager without a store of its own is refused', async t => {
  const options = { contextManager: {} as AsyncLocalStorageContextManager, contextOf: () => undefined }
  t.throws(() => traceTasks(options), { name: 'TypeError', message: 'This context manager has no `_asyncLocalStorage`' })
})

t.test('once stopped, nothing listens to tasks, and they see the context of their `addTask` call, as without tracing', async t => {
  const { app } = await start(t, () => {})
  const [expected, active] = await tracer.startActiveSpan('cron', async span => {
    await telemetry.stop()
    const seen = new Promise(resolve => { app.backgroundTasks.addTask(() => { resolve(trace.getActiveSpan()) }) })
    return [span, await seen]
  })
  t.equal(active, expected)
  const run = tracingChannel('fastify-background-tasks.run')
  const channels = [run.start, run.end, run.asyncStart, run.asyncEnd, run.error, channel('fastify-background-tasks.enqueue')]
  t.strictSame(channels.filter(({ hasSubscribers }) => hasSubscribers), [])
})
