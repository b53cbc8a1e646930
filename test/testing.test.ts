import { Type } from '@sinclair/typebox'
import Fastify, { type FastifyInstance } from 'fastify'
import t from 'tap'
import backgroundTasks, { defineTask, type FastifyBackgroundTasksOptions } from '../lib/index.js'
import { recordTasks, type TaskRecorder } from '../lib/testing.js'
import { collectLogs, deferred, start } from './support/app.js'
import { StubEngine } from './support/stub-engine.js'

const ran: string[] = []
const job = defineTask({ name: 'job', payload: Type.Object({ at: Type.String() }), timeout: 1_000, handler ({ at }) { ran.push(at) } })
const run = (what: string): void => { ran.push(what) }
t.beforeEach(() => { ran.length = 0 })

interface Recording { app: FastifyInstance, tasks: TaskRecorder }

async function record (t: Parameters<typeof start>[0], options: FastifyBackgroundTasksOptions = {}): Promise<Recording> {
  const { app } = await start(t, { tasks: [job], ...options })
  return { app, tasks: recordTasks(app) }
}

t.test('what is added is recorded, not run: with name, arguments or payload, request, placement and options', async t => {
  const { app, tasks } = await record(t)
  app.addHook('preHandler', async request => { request.backgroundTasks.addTask(run, 'hook') })
  app.get('/', async request => {
    request.backgroundTasks.with({ name: 'named', timeout: 5, when: 'always' }).addTask(run, 'route')
    request.backgroundTasks.addTask(job, { at: 'job' }, { key: 'k', delay: 60_000 })
    return {}
  })
  t.equal((await app.inject('/')).statusCode, 200)
  app.backgroundTasks.addTask(() => { ran.push('app') })
  const { id, duplicate } = await app.backgroundTasks.enqueue(job, { at: 'enqueued' })
  await app.backgroundTasks.idle()
  t.strictSame(ran, [], 'idle() does not wait for what is recorded')
  t.match(tasks.added, [
    { name: 'run', args: ['hook'], requestId: 'req-1', placement: 'local', options: {} },
    { name: 'named', args: ['route'], requestId: 'req-1', placement: 'local', options: { name: 'named', timeout: 5, when: 'always' } },
    { name: 'job', payload: { at: 'job' }, requestId: 'req-1', placement: 'local', options: { key: 'k', delay: 60_000, timeout: 1_000 } },
    { name: 'anonymous', args: [], placement: 'local', options: {} },
    { name: 'job', payload: { at: 'enqueued' }, placement: 'local', options: { timeout: 1_000 } }
  ])
  t.strictSame(tasks.added.map(({ options }) => Object.keys(options).length), [0, 3, 3, 0, 1])
  t.strictSame(Object.keys(tasks.added[0] ?? {}), ['name', 'args', 'requestId', 'placement', 'options', 'task'], 'nothing undefined is in the way of a comparison')
  t.strictSame(tasks.added.map(({ task }) => task.state), Array(5).fill('pending'))
  t.equal(tasks.added[4]?.task.id, id)
  t.notOk(duplicate)
  t.match(await app.backgroundTasks.get(job, id), { state: 'pending', attempt: 0 })
})

t.test('run() runs them in order, with what they add, and waits for the requests in flight', async t => {
  const { app, tasks } = await record(t)
  app.get('/:name', async request => {
    const { name } = request.params as { name: string }
    request.backgroundTasks.addCleanup(run, `${name} cleanup`)
    request.backgroundTasks.addTask(async () => {
      await new Promise(resolve => { setImmediate(resolve) })
      ran.push(`${name} 1`)
      request.backgroundTasks.addTask(run, `${name} 3`)
      app.backgroundTasks.addTask(run, `${name} app`)
    })
    request.backgroundTasks.addTask(job, { at: `${name} 2` }, { delay: 60_000 })
  })
  await Promise.all([app.inject('/a'), app.inject('/b')])
  await Promise.all([tasks.run(), tasks.run()])
  t.strictSame(ran, ['a 1', 'a 2', 'a 3', 'a cleanup', 'b 1', 'b 2', 'b 3', 'b cleanup', 'a app', 'b app'], 'list by list, a delay is over, a second call changes nothing')
  t.equal(tasks.added.length, 8)
  t.strictSame(tasks.added.map(({ task }) => task.state), Array(8).fill('succeeded'))
  await tasks.run()
  t.equal(ran.length, 10, 'once')
})

t.test('run() waits for a request whose handler goes on', async t => {
  const { app, tasks } = await record(t)
  const [isAdded, gate] = [deferred(), deferred()]
  app.get('/', async request => {
    request.backgroundTasks.addTask(run, 'task')
    isAdded.resolve()
    await gate.promise
  })
  const injected = app.inject('/')
  await isAdded.promise
  const done = tasks.run()
  gate.resolve()
  await Promise.all([injected, done])
  t.strictSame(ran, ['task'])
})

t.test('run() rejects with the first failure when all have run; attempts are not waited for', async t => {
  const failed: unknown[] = []
  const flaky = defineTask({
    name: 'flaky',
    retry: { attempts: 3, backoff: { type: 'fixed', delay: 60_000 } },
    handler (_, { attempt }) { ran.push(`attempt ${attempt}`); if (attempt < 3) throw new Error('not yet') }
  })
  const broken = defineTask({
    name: 'broken',
    retry: { attempts: 2, backoff: { type: 'fixed', delay: 60_000 } },
    handler () { throw new Error('broken') },
    onFailed (_, error) { failed.push(error) }
  })
  const { app, tasks } = await record(t, { tasks: [flaky, broken], onError (error) { failed.push(error) } })
  app.backgroundTasks.addTask(flaky, {})
  app.backgroundTasks.addTask(broken, {})
  app.backgroundTasks.addTask(() => { throw undefined }) // eslint-disable-line no-throw-literal
  app.backgroundTasks.addTask(run, 'last')
  await t.rejects(tasks.run(), { message: 'broken' })
  t.strictSame(ran, ['attempt 1', 'attempt 2', 'attempt 3', 'last'])
  t.match(failed, [{ message: 'broken' }, { message: 'broken' }, undefined])
  await tasks.run()
  app.backgroundTasks.addTask(() => { throw undefined }) // eslint-disable-line no-throw-literal
  const thrown = await tasks.run().then(() => 'nothing', error => error)
  t.equal(thrown, undefined, 'whatever was thrown')
})

t.test('a failure before the recording is not run()\'s', async t => {
  const failed = deferred()
  const { app } = await start(t, { onError: failed.resolve })
  app.backgroundTasks.addTask(() => { throw new Error('before') })
  await failed.promise
  const tasks = recordTasks(app)
  app.backgroundTasks.addTask(run, 'recorded')
  await tasks.run()
  t.strictSame(ran, ['recorded'])
})

t.test('when, stopOnError and cancel() are as in production', async t => {
  const { app, tasks } = await record(t, { stopOnError: true })
  app.get('/fails', async request => {
    request.backgroundTasks.addTask(run, 'success')
    request.backgroundTasks.with({ when: 'error' }).addTask(run, 'error')
    throw new Error('of the route')
  })
  app.get('/stops', async request => {
    request.backgroundTasks.addTask(() => { throw new Error('of the task') })
    request.backgroundTasks.addTask(run, 'stopped')
  })
  app.get('/cancels', async request => { request.backgroundTasks.addTask(run, 'cancelled') })
  await app.inject('/fails')
  await app.inject('/stops')
  await app.inject('/cancels')
  t.ok(tasks.added.at(-1)?.task.cancel())
  await t.rejects(tasks.run(), { message: 'of the task' })
  t.strictSame(ran, ['error'])
  t.strictSame(tasks.added.map(({ task }) => task.state), ['skipped', 'succeeded', 'failed', 'skipped', 'skipped'])
})

t.test('a definition on an engine is recorded without its server, before and after the plugin is loaded', async t => {
  for (const order of ['before', 'after']) {
    const { logger, logs } = collectLogs()
    const engine = new StubEngine()
    const app = Fastify({ logger })
    const service = async (): Promise<void> => { await app.register(backgroundTasks, { tasks: [job], engine }) }
    if (order === 'after') await service()
    const tasks = recordTasks(app)
    if (order === 'before') await service()
    app.post('/', async (request, reply) => {
      const { id } = request.backgroundTasks.addTask(job, { at: 'request' })
      return reply.code(202).send({ id })
    })
    app.get('/hijacked', (request, reply) => {
      request.backgroundTasks.addTask(job, { at: 'hijacked' })
      reply.hijack()
      reply.raw.end()
    })
    t.equal((await app.inject({ method: 'POST', url: '/' })).statusCode, 202)
    await app.inject('/hijacked')
    await app.backgroundTasks.enqueue(job, { at: 'now' }, { tx: { executeSql: async () => undefined } })
    t.strictSame(tasks.added.map(({ placement, payload }) => [placement, payload]), [
      ['stub', { at: 'request' }], ['stub', { at: 'hijacked' }], ['stub', { at: 'now' }]
    ], order)
    await tasks.run()
    t.strictSame(ran.splice(0), ['request', 'hijacked', 'now'])
    t.strictSame(engine.calls, [], 'the engine was not asked for anything')
    t.equal(app.backgroundTasks.stats.enqueued, 0)
    await app.close()
    tasks.restore()
    t.strictSame(engine.calls, [], 'nor at the close')
    t.notMatch(logs, [{ level: 40 }])
  }
})

t.test('what is recorded can be counted, found, retried, cancelled and waited for, without the server of the engine', async t => {
  const engine = new StubEngine()
  Object.assign(engine, { count () {}, find () {}, retry () {}, cancel () {} })
  Object.assign(engine.supports, { count: true, find: true, retry: true, cancel: true })
  const fails = defineTask({ name: 'fails', retry: { attempts: 2 }, handler () { throw new Error('no') } })
  const { app, tasks } = await record(t, { tasks: [job, fails], engine })
  await app.ready()
  const { backgroundTasks: all } = app
  t.strictSame(all.health(), { engine: 'stub', connected: true, consuming: ['job', 'fails'] })
  const [first, second, later] = await Promise.all([all.enqueue(job, { at: '1' }), all.enqueue(job, { at: '2' }), all.enqueue(job, { at: 'later' }, { delay: 60_000 })])
  const failing = await all.enqueue(fails)
  t.match(await all.count(job), { pending: 3, delayed: 0, failed: 0 }, 'a delay is over immediately')
  t.strictSame((await all.find(job, { state: 'pending' })).records.map(({ id }) => id).toSorted(), [first.id, second.id, later.id].toSorted())
  t.equal(await all.result(job, first.id, { timeout: 0 }), undefined, 'nothing runs by itself')
  t.equal(await all.cancel(job, second.id), true)
  t.equal(await all.cancel(job, second.id), false)
  const result = all.result(job, first.id, { timeout: 10_000 })
  await t.rejects(tasks.run(), { message: 'no' })
  t.match(await result, { id: first.id, state: 'succeeded' })
  t.strictSame(ran, ['1', 'later'])
  t.match(await all.find(fails, { state: 'failed' }), { records: [{ id: failing.id, attempt: 2, error: { message: 'no' } }] })
  t.equal(await all.retry(fails, failing.id), true)
  t.match(await all.get(fails, failing.id), { state: 'pending', attempt: 0 })
  t.equal(tasks.added.length, 5, 'a retry is recorded as a task that was added')
  t.match(await all.count(fails), { pending: 1, failed: 0 })
  await t.rejects(tasks.run(), { message: 'no' })
  t.match(await all.count(fails), { pending: 0, failed: 1 })
  tasks.clear()
  t.strictSame((await all.find(job, { state: 'skipped' })).records.map(({ id }) => id), [second.id])
  t.strictSame(engine.calls, [])
})

t.test('the limits of an engine are those of production', async t => {
  const engine = new StubEngine()
  Object.assign(engine.supports, { key: false, get: false })
  const { app, tasks } = await record(t, { engine, maxPending: 1 })
  for (const refused of [app.backgroundTasks.count(job), app.backgroundTasks.find(job, { state: 'failed' }), app.backgroundTasks.retry(job, 'id'), app.backgroundTasks.cancel(job, 'id'), app.backgroundTasks.result(job, 'id', { timeout: 1 })]) {
    await t.rejects(refused as Promise<unknown>, { code: 'FST_BGT_UNSUPPORTED' })
  }
  t.throws(() => app.backgroundTasks.addTask(job, { at: '' }, { key: 'k' }), { code: 'FST_BGT_UNSUPPORTED' })
  await t.rejects(app.backgroundTasks.get(job, 'id'), { code: 'FST_BGT_UNSUPPORTED' })
  t.throws(() => app.backgroundTasks.addTask(job, { at: 1 } as never), { code: 'FST_BGT_INVALID_PAYLOAD' })
  app.backgroundTasks.addTask(run, '1')
  t.throws(() => app.backgroundTasks.addTask(run, '2'), { code: 'FST_BGT_OVERLOADED' })
  t.equal(tasks.added.length, 1, 'what was refused was not added')
})

t.test('clear() forgets what was added, skips what has not run, and lets cleanups run', async t => {
  const { app, tasks } = await record(t)
  app.get('/', async request => {
    request.backgroundTasks.addTask(run, 'task')
    request.backgroundTasks.addCleanup(run, 'cleanup')
  })
  app.get('/cleanup', async request => { request.backgroundTasks.addCleanup(run, 'cleanup alone') })
  await app.inject('/')
  const [first] = tasks.added
  tasks.clear()
  t.strictSame(tasks.added, [])
  await app.backgroundTasks.idle()
  t.equal(first?.task.state, 'skipped')
  t.strictSame(ran, ['cleanup'])
  await app.inject('/cleanup')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['cleanup', 'cleanup alone'], 'which is no task')
  app.backgroundTasks.addTask(run, 'later')
  await tasks.run()
  t.strictSame(ran, ['cleanup', 'cleanup alone', 'later'])
})

t.test('restore() ends it: tasks run again, on the engine where they have one', async t => {
  const engine = new StubEngine()
  const { app, tasks } = await record(t, { engine })
  await app.ready()
  app.backgroundTasks.addTask(run, 'recorded')
  tasks.restore()
  t.strictSame(engine.calls, ['start'], 'at once, for a worker may have nothing to store')
  app.backgroundTasks.addTask(run, 'runs')
  await app.backgroundTasks.enqueue(job, { at: 'stored' })
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['runs'])
  t.match(engine.stored, [[{ payload: { at: 'stored' } }]])
  t.strictSame([...engine.calls].sort(), ['consume', 'enqueue', 'start'])
  t.strictSame(tasks.added.map(({ task }) => task.state), ['skipped'], 'what was recorded can be looked at')
  await t.rejects(tasks.run(), { code: 'FST_BGT_INVALID_OPTION' })
  const later = Fastify()
  recordTasks(later).restore()
  await later.register(backgroundTasks)
  later.backgroundTasks.addTask(run, 'registered later')
  await later.close()
  t.strictSame(ran, ['runs', 'registered later'])
})

t.test('a second recordTasks() takes the place of the first', async t => {
  const engine = new StubEngine()
  const { app, tasks } = await record(t, { engine })
  await app.ready()
  app.backgroundTasks.addTask(run, 'first')
  const second = recordTasks(app)
  app.backgroundTasks.addTask(run, 'second')
  tasks.restore()
  app.backgroundTasks.addTask(job, { at: 'third' })
  await second.run()
  t.strictSame(ran, ['second', 'third'])
  t.strictSame(engine.calls, [], 'the engine is still not connected to')
  t.equal(tasks.added.length, 1)
})

t.test('what an engine delivers runs, and what was added before', async t => {
  const engine = new StubEngine()
  const { app } = await start(t, { tasks: [job], engine })
  await app.ready()
  app.backgroundTasks.addTask(run, 'before')
  const delayed = await start(t, { tasks: [job] })
  const waits = delayed.app.backgroundTasks.addTask(job, { at: 'delayed' }, { delay: 60_000 })
  recordTasks(delayed.app)
  await new Promise(resolve => { setImmediate(resolve) })
  t.equal(waits.state, 'pending', 'its delay is not over')
  t.ok(waits.cancel())
  const tasks = recordTasks(app)
  app.backgroundTasks.addTask(run, 'after')
  t.match(await engine.deliver({ task: 'job', payload: { at: 'delivered' } }), { kind: 'done' })
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['before', 'delivered'])
  t.equal(tasks.added.length, 1)
})

t.test('a job that was added before the recording is stored with its reply, and one that was added after it is recorded', async t => {
  const engine = new StubEngine()
  const { app } = await start(t, { tasks: [job], engine })
  let recorder: TaskRecorder | undefined
  app.get('/', async (request, reply) => {
    request.backgroundTasks.addTask(job, { at: 'before' })
    recorder = recordTasks(app)
    request.backgroundTasks.addTask(job, { at: 'after' })
    return reply.code(202).send()
  })
  t.equal((await app.inject('/')).statusCode, 202)
  t.match(engine.stored, [[{ payload: { at: 'before' } }]])
  t.match(recorder?.added, [{ payload: { at: 'after' } }])
  recorder?.clear()
  await app.backgroundTasks.idle()
  t.match(app.backgroundTasks.stats, { pending: 0, enqueued: 1, skipped: 1 })
})

t.test('app.close() waits for nothing that is recorded, names nothing, and runs cleanups', async t => {
  const { logger, logs } = collectLogs()
  const app = Fastify({ logger })
  const tasks = recordTasks(app)
  await app.register(backgroundTasks)
  app.get('/', async request => {
    request.backgroundTasks.addTask(run, 'task')
    request.backgroundTasks.addCleanup(run, 'cleanup')
  })
  await app.inject('/')
  await app.close()
  t.strictSame(ran, ['cleanup'])
  t.strictSame(tasks.added.map(({ task }) => task.state), ['skipped'])
  t.strictSame(logs.filter(({ level }) => level > 30), [])
  await tasks.run()
  tasks.restore()
})

t.test('plugins of children are recorded, each with its own tasks', async t => {
  for (const order of ['before', 'after']) {
    const app = Fastify()
    t.teardown(() => app.close())
    let tasks = order === 'before' ? recordTasks(app) : undefined
    for (const name of ['a', 'b']) {
      await app.register(async child => {
        await child.register(backgroundTasks)
        child.get(`/${name}`, async request => { request.backgroundTasks.addTask(run, name) })
      })
    }
    await app.ready()
    tasks ??= recordTasks(app)
    await app.inject('/a')
    await app.inject('/b')
    t.strictSame(ran, [])
    await tasks.run()
    t.strictSame(ran.splice(0), ['a', 'b'], order)
  }
})

t.test('of an app and its child the last one records', async t => {
  const { app } = await start(t, { tasks: [job], engine: new StubEngine() })
  const recorders: TaskRecorder[] = []
  await app.register(async child => { recorders.push(recordTasks(child)) })
  recorders.push(recordTasks(app))
  app.backgroundTasks.addTask(job, { at: 'the last' })
  const [first, last] = recorders
  t.equal(first?.added.length, 0)
  first?.restore()
  await last?.run()
  t.strictSame(ran, ['the last'])
  last?.restore()
  t.ok((await app.backgroundTasks.enqueue(job, { at: 'stored' })).id)
  t.equal(app.backgroundTasks.stats.enqueued, 1, 'the engine is there again')
})

t.test('fake timers of a test do not stop it', async t => {
  const { app, tasks } = await record(t)
  app.backgroundTasks.addTask(job, { at: 'delayed' }, { delay: 60_000 })
  const timers = { setImmediate, setTimeout }
  Object.assign(globalThis, { setImmediate () {}, setTimeout () {} })
  t.teardown(() => { Object.assign(globalThis, timers) })
  await tasks.run()
  Object.assign(globalThis, timers)
  t.strictSame(ran, ['delayed'])
})

t.test('misuse is refused with words', async t => {
  t.throws(() => recordTasks(undefined as never), { code: 'FST_BGT_INVALID_OPTION', message: 'recordTasks accepts a Fastify app; received undefined' })
  t.throws(() => recordTasks({} as never), { message: 'recordTasks accepts a Fastify app; received {}' })
  const app = Fastify()
  const tasks = recordTasks(app)
  await t.rejects(tasks.run(), { code: 'FST_BGT_INVALID_OPTION', message: /register the plugin/ })
})
