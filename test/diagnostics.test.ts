/** What is published on node:diagnostics_channel, and when. */
import t from 'tap'
import { AsyncLocalStorage } from 'node:async_hooks'
import { subscribe, tracingChannel, unsubscribe } from 'node:diagnostics_channel'
import { setImmediate as turn } from 'node:timers/promises'
import { defineTask, type TaskAbandonedMessage, type TaskAddedMessage, type TaskFailedMessage, type TaskRunMessage, type TaskSkippedMessage } from '../lib/index.js'
import { deferred, start } from './support/app.js'
import { StubEngine } from './support/stub-engine.js'

const run = tracingChannel<unknown, TaskRunMessage>('fastify-background-tasks.run')

/** The five events of the run channel, in order. */
function recordRuns (t: { teardown: (fn: () => void) => void }): Array<[string, TaskRunMessage]> {
  const events: Array<[string, TaskRunMessage]> = []
  const record = (event: string) => (message: TaskRunMessage) => { events.push([`${event} ${message.task.name}`, { ...message }]) }
  const subscribers = {
    start: record('start'), end: record('end'), asyncStart: record('asyncStart'), asyncEnd: record('asyncEnd'), error: record('error')
  }
  run.subscribe(subscribers)
  t.teardown(() => { run.unsubscribe(subscribers) })
  return events
}

function record<Message> (t: { teardown: (fn: () => void) => void }, name: string): Message[] {
  const messages: Message[] = []
  const listener = (message: unknown): void => { messages.push(message as Message) }
  subscribe(name, listener)
  t.teardown(() => { unsubscribe(name, listener) })
  return messages
}

t.test('each run is traced from its start to its end, with its result or error', async t => {
  const events = recordRuns(t)
  const { app } = await start(t)
  const broken = new Error('broken')
  app.get('/', async request => {
    const tasks = request.backgroundTasks
    tasks.addTask(function sync () { return 1 })
    tasks.addTask(function throws () { throw broken })
    tasks.addTask(async function resolves () { await turn(); return 2 })
    tasks.addTask(async function rejects () { await turn(); throw broken })
    tasks.with({ when: 'error' }).addTask(function skipped () {})
    tasks.addCleanup(async function cleanup () {})
    return 'ok'
  })
  await app.inject('/')
  app.backgroundTasks.addTask(function ofTheApp () {})
  await app.backgroundTasks.idle()
  t.strictSame(events.map(([event]) => event).filter(event => !event.endsWith('ofTheApp')), [
    'start sync', 'end sync',
    'start throws', 'error throws', 'end throws',
    'start resolves', 'end resolves', 'asyncStart resolves', 'asyncEnd resolves',
    'start rejects', 'end rejects', 'error rejects', 'asyncStart rejects', 'asyncEnd rejects'
  ])
  const last = new Map(events)
  t.match(last.get('start sync'), { queuedMs: Number, request: { url: '/' } })
  t.notOk('result' in (last.get('start sync') as object))
  t.equal(last.get('end sync')?.result, 1)
  t.equal(last.get('end throws')?.error, broken)
  t.notOk('result' in (last.get('end resolves') as object))
  t.equal(last.get('asyncEnd resolves')?.result, 2)
  t.equal(last.get('asyncEnd rejects')?.error, broken)
  t.notOk('request' in (last.get('start ofTheApp') as object))
})

t.test('a run of a definition says which attempt it is, and what has travelled with the task', async t => {
  const events = recordRuns(t)
  const engine = new StubEngine()
  const flaky = defineTask({
    name: 'flaky', retry: { attempts: 2, backoff: { delay: 1 } }, handler (_: undefined, { attempt }) { if (attempt === 1) throw new Error('once') }
  })
  const local = await start(t, { tasks: [flaky] })
  local.app.get('/', async request => { request.backgroundTasks.addTask(flaky) })
  await local.app.inject({ url: '/', headers: { traceparent: '00-1-2-01' } })
  local.app.backgroundTasks.addTask(function withoutDefinition () {})
  await local.app.backgroundTasks.idle()
  const worker = await start(t, { tasks: [flaky], engine })
  await worker.app.ready()
  await engine.deliver({ task: 'flaky', attempt: 2, headers: { traceparent: '00-3-4-01' } })

  const starts = events.filter(([event]) => event.startsWith('start')).map(([event, { attempt, headers }]) => [event, attempt, headers])
  t.strictSame(starts.filter(([event]) => event === 'start flaky'), [
    ['start flaky', 1, { traceparent: '00-1-2-01' }],
    ['start flaky', 2, { traceparent: '00-1-2-01' }],
    ['start flaky', 2, { traceparent: '00-3-4-01' }]
  ])
  t.strictSame(starts.filter(([event]) => event !== 'start flaky'), [['start withoutDefinition', undefined, undefined]])
})

t.test('a tracer binds a store of its own, over that of the addTask call', async t => {
  const { app } = await start(t)
  const spans = new AsyncLocalStorage<string>()
  const seen: unknown[] = []
  run.start.bindStore(spans, message => `span of ${message.task.name}, in ${String(spans.getStore())}`)
  t.teardown(() => { run.start.unbindStore(spans) })
  spans.run('request', () => {
    app.backgroundTasks.addTask(async function task () {
      await turn()
      seen.push(spans.getStore())
    })
  })
  await app.backgroundTasks.idle()
  t.strictSame(seen, ['span of task, in request'])
})

t.test('a run ends for the tracer when it ends for the list: at its timeout, and at the deadline of the drain', async t => {
  const events = recordRuns(t)
  const { app } = await start(t, { closeTimeout: 20 })
  const alive = setInterval(() => {}, 60_000)
  t.teardown(() => { clearInterval(alive) })
  const never = deferred()
  app.backgroundTasks.with({ timeout: 5 }).addTask(async function timesOut () { await never.promise })
  await app.backgroundTasks.idle()
  t.match(events.at(-1), ['asyncEnd timesOut', { error: { code: 'FST_BGT_TIMEOUT' } }])
  app.backgroundTasks.addTask(async function abandoned () { await never.promise })
  await app.close()
  t.match(events.at(-1), ['asyncEnd abandoned', { error: { name: 'AbortError' } }])
  const { length } = events
  never.resolve()
  await turn()
  t.equal(events.length, length)
})

t.test('added, skipped and abandoned tasks are published', async t => {
  const added = record<TaskAddedMessage>(t, 'fastify-background-tasks.added')
  const skipped = record<TaskSkippedMessage>(t, 'fastify-background-tasks.skipped')
  const abandoned = record<TaskAbandonedMessage>(t, 'fastify-background-tasks.abandoned')
  const { app } = await start(t, { closeTimeout: 0 })
  app.get('/', async request => {
    request.backgroundTasks.addTask(function cancelled () {}).cancel()
    request.backgroundTasks.with({ when: 'error' }).addTask(function conditional () {})
    return 'ok'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  app.backgroundTasks.addTask(function atTheDeadline () {})
  await app.close()
  app.backgroundTasks.addTask(function afterTheClose () {})
  t.strictSame(added.map(({ task }) => task.name), ['cancelled', 'conditional', 'atTheDeadline', 'afterTheClose'])
  t.match(skipped, [
    { task: { name: 'cancelled' }, reason: 'it was cancelled', request: { url: '/' } },
    { task: { name: 'conditional' }, reason: /its `when` is 'error'/ }
  ])
  t.match(abandoned, [{ task: { name: 'atTheDeadline' }, ageMs: Number }, { task: { name: 'afterTheClose' }, ageMs: Number }])
})

t.test('failed tasks are published once, when no attempt is left, whether they have run or not', async t => {
  const runs = recordRuns(t)
  const failed = record<TaskFailedMessage>(t, 'fastify-background-tasks.failed')
  const broken = new Error('broken')
  const flaky = defineTask({
    name: 'flaky', retry: { attempts: 3, backoff: { delay: 1 } }, handler (until: number, { attempt }) { if (attempt < until) throw broken }
  })
  const { app } = await start(t, { tasks: [flaky] })
  app.get('/', async request => {
    request.backgroundTasks.addTask(async function rejects () { await turn(); throw broken })
    request.backgroundTasks.with({ when () { throw broken } }).addTask(function unasked () {})
    request.backgroundTasks.addTask(flaky, 4)
    request.backgroundTasks.addTask(flaky, 3)
    return 'ok'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.equal(runs.filter(([event]) => event === 'error flaky').length, 5)
  t.match(failed, ['rejects', 'unasked', 'flaky'].map(name => ({ task: { name, state: 'failed' }, request: { url: '/' }, error: broken })))
  t.equal(failed.length, app.backgroundTasks.stats.failed)
})

t.test('what an engine has stored is published, and what it has not as a failure', async t => {
  const failed = record<TaskFailedMessage>(t, 'fastify-background-tasks.failed')
  const enqueued = record<TaskAddedMessage>(t, 'fastify-background-tasks.enqueued')
  const engine = new StubEngine()
  const job = defineTask({ name: 'job', handler () {} })
  const { app } = await start(t, { tasks: [job], engine })
  app.get('/', async request => ({ id: request.backgroundTasks.addTask(job).id }))
  const { id } = (await app.inject('/')).json<{ id: string }>()
  await app.backgroundTasks.enqueue(job, undefined, { key: 'k' })
  await app.backgroundTasks.enqueue(job, undefined, { key: 'k' })
  t.match(enqueued, [{ task: { id, name: 'job', state: 'enqueued' }, request: { url: '/' } }, { task: { name: 'job', state: 'enqueued' } }])
  t.equal(enqueued.length, app.backgroundTasks.stats.enqueued, 'what was stored before is not stored again')
  t.strictSame(failed, [])
  engine.onEnqueue = async () => { throw new Error('connection refused') }
  t.equal((await app.inject('/')).statusCode, 503)
  t.match(failed, [{ task: { name: 'job', state: 'failed' }, request: { url: '/' }, error: { code: 'FST_BGT_ENGINE_UNAVAILABLE' } }])
})
