// What examples/metrics tells Prometheus.
import { channel, tracingChannel } from 'node:diagnostics_channel'
import { setImmediate as turn } from 'node:timers/promises'
import { Registry } from 'prom-client'
import t, { type Test } from 'tap'
import { buildApp } from '../examples/metrics/app.js'
import { taskMetrics } from '../examples/metrics/task-metrics.js'
import { defineTask, type FastifyBackgroundTasksOptions } from '../lib/index.js'
import { deferred, start, type Started } from './support/app.js'
import { StubEngine } from './support/stub-engine.js'

t.test('the shop: what has become of its tasks, by name and state', async t => {
  const app = await buildApp()
  t.teardown(() => app.close())
  const address = await app.listen({ port: 0, host: '127.0.0.1' })
  for (const [method, path, status] of [['POST', '/orders', 202], ['POST', '/orders', 202], ['DELETE', '/orders/1', 409]] as const) {
    t.equal((await fetch(address + path, { method })).status, status)
  }
  await app.backgroundTasks.idle()
  const reply = await fetch(`${address}/metrics`)
  t.equal(reply.headers.get('content-type'), 'text/plain; version=0.0.4; charset=utf-8')
  const metrics = read(await reply.text())

  t.strictSame(series(metrics, 'background_tasks_added_total'), {
    '{task="countOrder"}': 2, '{task="sendReceipt"}': 3, '{task="notify-warehouse"}': 2, '{task="update-search"}': 2
  })
  t.strictSame(series(metrics, 'background_tasks_ended_total'), {
    '{task="countOrder",state="succeeded"}': 2,
    '{task="sendReceipt",state="succeeded"}': 2,
    '{task="sendReceipt",state="skipped"}': 1,
    '{task="notify-warehouse",state="succeeded"}': 2,
    '{task="update-search",state="failed"}': 2
  }, 'an attempt that is followed by another one has not ended its task')
  t.strictSame(series(metrics, 'background_task_run_duration_seconds_count'), {
    '{task="countOrder",outcome="success"}': 2,
    '{task="sendReceipt",outcome="success"}': 2,
    '{task="notify-warehouse",outcome="error"}': 2,
    '{task="notify-warehouse",outcome="success"}': 2,
    '{task="update-search",outcome="error"}': 4
  }, 'each attempt is a run')
  t.strictSame(series(metrics, 'background_task_queue_duration_seconds_count'), {
    '{task="countOrder"}': 2, '{task="sendReceipt"}': 2, '{task="notify-warehouse"}': 2, '{task="update-search"}': 2
  }, 'a task waits once')
  t.strictSame(series(metrics, 'background_tasks_stored'), Object.fromEntries(['notify-warehouse', 'update-search'].flatMap(task =>
    ['pending', 'delayed', 'running', 'retrying', 'failed'].map(state => [`{task="${task}",state="${state}"}`, task === 'update-search' && state === 'failed' ? 2 : 0]))))
  const slow = metrics.get('background_task_run_duration_seconds_sum{task="sendReceipt",outcome="success"}') ?? NaN
  t.ok(slow >= 0.39 && slow < 60, `two runs of 0.2 s took ${slow} s`)
  t.equal(metrics.get('background_task_run_duration_seconds_bucket{le="0.1",task="sendReceipt",outcome="success"}'), 0)
  t.equal(metrics.get('background_task_run_duration_seconds_bucket{le="60",task="sendReceipt",outcome="success"}'), 2)
})

t.test('what waits and what runs is read when Prometheus asks', async t => {
  const { app, scrape } = await measured(t, { concurrency: 1 })
  const gauges = ['background_tasks_pending', 'background_tasks_running', 'background_tasks_oldest_pending_seconds']
  const told = async (): Promise<Array<number | undefined>> => {
    const metrics = await scrape()
    return gauges.map(name => metrics.get(name))
  }
  const [started, gate] = [deferred(), deferred()]
  t.strictSame(await told(), [0, 0, 0])
  app.backgroundTasks.addTask(async function blocks () { started.resolve(); await gate.promise })
  app.backgroundTasks.addTask(function waits () {})
  await started.promise
  const [pending, running, oldest = NaN] = await told()
  t.strictSame([pending, running], [1, 1])
  const { oldestPendingMs } = app.backgroundTasks.stats
  t.ok(oldest > 0 && oldest <= oldestPendingMs / 1_000, `${oldest} s of ${oldestPendingMs} ms`)
  gate.resolve()
  await app.backgroundTasks.idle()
  t.strictSame(await told(), [0, 0, 0])
})

t.test('an engine that does not count has no series, and the others are scraped', async t => {
  const counted = defineTask({ name: 'counted', handler () {} })
  const engine = new StubEngine()
  engine.supports.count = true
  let isAway = false
  Object.assign(engine, { count: async () => isAway ? await Promise.reject(new Error('away')) : { pending: 3, failed: 1 } })
  const { app, logs } = await start(t, { tasks: [counted], engine })
  const registry = new Registry()
  await app.register(taskMetrics, { registry, definitions: [counted] })
  const scrape = async (): Promise<Map<string, number>> => read((await app.inject('/metrics')).body)
  t.strictSame(series(await scrape(), 'background_tasks_stored'), { '{task="counted",state="pending"}': 3, '{task="counted",state="failed"}': 1 })
  isAway = true
  const metrics = await scrape()
  t.strictSame(series(metrics, 'background_tasks_stored'), {})
  t.equal(metrics.get('background_tasks_pending'), 0)
  t.match(logs.filter(({ level }) => level === 40), [{ msg: 'tasks of "counted" could not be counted', err: { code: 'FST_BGT_ENGINE_UNAVAILABLE' } }])
})

t.test('functions that fail, at once, later, or before they have run, count once each', async t => {
  const { app, scrape } = await measured(t)
  app.get('/', async request => {
    request.backgroundTasks.addTask(function throws () { throw new Error('at once') })
    request.backgroundTasks.addTask(async function rejects () { await turn(); throw new Error('later') })
    request.backgroundTasks.with({ timeout: 1 }).addTask(async function hangs () { await new Promise(() => {}) })
    request.backgroundTasks.with({ when () { throw new Error('undecided') } }).addTask(function unasked () {})
    request.backgroundTasks.addTask(function cancelled () {}).cancel()
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  const metrics = await scrape()
  t.strictSame(series(metrics, 'background_tasks_ended_total'), {
    '{task="throws",state="failed"}': 1,
    '{task="rejects",state="failed"}': 1,
    '{task="hangs",state="failed"}': 1,
    '{task="unasked",state="failed"}': 1,
    '{task="cancelled",state="skipped"}': 1
  })
  t.strictSame(Object.keys(series(metrics, 'background_task_run_duration_seconds_count')), [
    '{task="throws",outcome="error"}', '{task="rejects",outcome="error"}', '{task="hangs",outcome="error"}'
  ])
})

t.test('with an engine: what is stored, what is not, and what its deliveries come to', async t => {
  const engine = new StubEngine()
  const job = defineTask({ name: 'job', retry: { attempts: 2 }, handler (fails: boolean) { if (fails) throw new Error('broken') } })
  const { app, scrape } = await measured(t, { tasks: [job], engine })
  app.get('/', async request => { request.backgroundTasks.addTask(job, true) })
  const ended = async (): Promise<Record<string, number>> => series(await scrape(), 'background_tasks_ended_total')

  t.equal((await app.inject('/')).statusCode, 200)
  await app.backgroundTasks.enqueue(job, false)
  t.strictSame(await ended(), { '{task="job",state="enqueued"}': 2 })

  t.match(await engine.deliver({ task: 'job', payload: true, attempt: 1 }), { kind: 'retry' })
  t.strictSame(await ended(), { '{task="job",state="enqueued"}': 2 }, 'it is the engine\'s again')
  t.match(await engine.deliver({ task: 'job', payload: true, attempt: 2 }), { kind: 'failed' })
  t.match(await engine.deliver({ task: 'job', payload: false }), { kind: 'done' })
  t.strictSame(await ended(), { '{task="job",state="enqueued"}': 2, '{task="job",state="failed"}': 1, '{task="job",state="succeeded"}': 1 })

  engine.onEnqueue = async () => { throw new Error('connection refused') }
  t.equal((await app.inject('/')).statusCode, 503)
  t.equal((await ended())['{task="job",state="failed"}'], 2, 'a task that nobody has stored has failed')
  t.equal((await scrape()).get('background_task_run_duration_seconds_count{task="job",outcome="error"}'), 2, 'and was not run')
})

t.test('what the drain has cut off is counted; then nothing is, and the channels have no subscribers left', async t => {
  const { app, registry } = await measured(t, { closeTimeout: 0 })
  const alive = setInterval(() => {}, 60_000)
  t.teardown(() => { clearInterval(alive) })
  const started = deferred()
  app.backgroundTasks.addTask(async function runs () { started.resolve(); await new Promise(() => {}) })
  await started.promise
  app.backgroundTasks.addTask(function waits () {})
  await app.close()
  const left = { '{task="runs",state="abandoned"}': 1, '{task="waits",state="abandoned"}': 1 }
  t.strictSame(series(read(await registry.metrics()), 'background_tasks_ended_total'), left)

  app.backgroundTasks.addTask(function late () {})
  t.strictSame(series(read(await registry.metrics()), 'background_tasks_ended_total'), left)
  const { start: runs, end, asyncEnd } = tracingChannel('fastify-background-tasks.run')
  const others = ['added', 'enqueued', 'failed', 'skipped', 'abandoned'].map(name => channel(`fastify-background-tasks.${name}`))
  t.strictSame([runs, end, asyncEnd, ...others].filter(({ hasSubscribers }) => hasSubscribers), [])
})

t.test('a registry has the metrics once, and the plugin stands behind that of the tasks', async t => {
  const { app, registry } = await measured(t)
  await t.rejects(async () => { await app.register(taskMetrics, { registry }) }, { message: /already been registered/ })
  const { default: Fastify } = await import('fastify')
  await t.rejects(async () => { await Fastify().register(taskMetrics, { registry: new Registry() }) }, { code: 'FST_ERR_PLUGIN_DEPENDENCY_NOT_REGISTERED' })
})

interface Measured extends Started {
  registry: Registry
  scrape: () => Promise<Map<string, number>>
}

/** An app with metrics of its own. */
async function measured (t: Test, options: FastifyBackgroundTasksOptions = {}): Promise<Measured> {
  const started = await start(t, options)
  const registry = new Registry()
  await started.app.register(taskMetrics, { registry })
  return { ...started, registry, scrape: async () => read((await started.app.inject('/metrics')).body) }
}

/** The samples of the text, by name and labels. */
function read (text: string): Map<string, number> {
  return new Map(text.split('\n').filter(line => line !== '' && !line.startsWith('#')).map(line => {
    const end = line.lastIndexOf(' ')
    return [line.slice(0, end), Number(line.slice(end + 1))]
  }))
}

/** The samples of one name, by their labels. */
function series (metrics: Map<string, number>, name: string): Record<string, number> {
  return Object.fromEntries([...metrics].filter(([key]) => key.startsWith(`${name}{`)).map(([key, value]) => [key.slice(name.length), value]))
}
