/** What few programs do, and any may. */
import { AsyncResource } from 'node:async_hooks'
import http from 'node:http'
import http2 from 'node:http2'
import { PassThrough } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import t from 'tap'
import { start } from './support/app.js'
import { bare, build, COMPLETE, listen, Witness } from './support/sockets.js'
import { StubEngine } from './support/stub-engine.js'
import { visit } from './support/visits.js'
import backgroundTasks, { defineTask, type BackgroundTask } from '../lib/index.js'

const { gc } = globalThis

t.test('what is no task is named by its class, whatever that has for a name', async t => {
  const { app } = await start(t)
  await app.ready()
  class Named {}
  Object.defineProperty(Named, 'name', { value: 5 })
  const refused: Array<[value: unknown, received: RegExp]> = [
    [new (class {})(), /an object \(anonymous\)/],
    [new Named(), /an object \(anonymous\)/],
    [Object.create(null), /an object \(without a prototype\)/],
    [Object.create({ get constructor () { throw new Error('hostile') } }), /received an object:/]
  ]
  for (const [value, received] of refused) {
    t.throws(() => app.backgroundTasks.addTask(value as never), { code: 'FST_BGT_INVALID_TASK', message: received })
  }
})

t.test('an error that nobody waited for may be gone: idle() rejects with its name, message and code', async t => {
  const { app } = await start(t)
  await app.ready()
  for (const code of [undefined, 'E_GONE']) {
    const task = app.backgroundTasks.addTask(async () => { throw Object.assign(new RangeError('too far'), code !== undefined && { code }) })
    while (task.state !== 'failed') await sleep(1)
    await sleep(1)
    gc?.()
    await t.rejects(app.backgroundTasks.idle({ rejectOnFailure: true }), { name: 'RangeError', message: /too far$/, ...code !== undefined && { code } })
  }
})

t.test('records go one by one, each when its time has come', async t => {
  const brief = defineTask({ name: 'brief', keep: { succeeded: 0.001 }, handler () {} })
  const kept = defineTask({ name: 'kept', handler () {} })
  const { app } = await start(t, { tasks: [brief, kept] })
  await app.ready()
  const sweeps: Array<() => void> = []
  const real = globalThis.setTimeout
  t.teardown(() => { globalThis.setTimeout = real })
  globalThis.setTimeout = ((fn: () => void, ms: number) => {
    sweeps.push(fn)
    return real(fn, ms)
  }) as never
  const tasks = [app.backgroundTasks.addTask(brief, undefined, { key: 'a' }), app.backgroundTasks.addTask(kept)]
  await app.backgroundTasks.idle()
  // The same key once more, whose first record has gone.
  while (await app.backgroundTasks.get(brief, tasks[0]?.id ?? '') !== undefined) await sleep(1)
  const again = app.backgroundTasks.addTask(brief, undefined, { key: 'a' })
  await app.backgroundTasks.idle()
  await sleep(5)
  for (const sweep of sweeps.slice()) sweep()
  t.equal(await app.backgroundTasks.get(brief, again.id), undefined)
  t.match(await app.backgroundTasks.get(kept, tasks[1]?.id ?? ''), { state: 'succeeded' })
})

t.test('an onError that settles after its time is not waited for, nor heard', async t => {
  let told = (): void => {}
  const { app, logs } = await start(t, { timeout: 20, onError: async () => { await new Promise<void>(resolve => { told = resolve }) } })
  await app.ready()
  app.backgroundTasks.addTask(() => { throw new Error('x') })
  await app.backgroundTasks.idle()
  t.match(logs.filter(({ msg }) => msg.startsWith('onError')), [{ err: { message: /20 ms/ } }])
  told()
  await sleep(1)
  t.equal(logs.filter(({ msg }) => msg.startsWith('onError')).length, 1)
})

t.test('shared schemas are compiled if a definition refers to them, and to what is inside of them', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  app.addSchema({ $id: 'http://shared.test/outer', type: 'object', definitions: { inner: { $id: 'http://shared.test/inner', type: 'string' } } })
  app.addSchema({ $id: 'http://shared.test/user', type: 'object', required: ['name'], properties: { name: { $ref: 'http://shared.test/inner' } } })
  const byId = defineTask<unknown>({ name: 'by-id', payload: { $ref: 'http://shared.test/user#' }, handler () {} })
  const plain = defineTask<unknown>({ name: 'plain', payload: { type: 'object', properties: { a: { type: 'array', items: [{ type: 'string' }] } } }, handler () {} })
  await app.register(backgroundTasks, { tasks: [byId, plain] })
  await app.ready()
  t.throws(() => app.backgroundTasks.addTask(byId, {}), { code: 'FST_BGT_INVALID_PAYLOAD' })
  t.throws(() => app.backgroundTasks.addTask(byId, { name: 5 }), { code: 'FST_BGT_INVALID_PAYLOAD' })
  app.backgroundTasks.addTask(byId, { name: 'a' })
  await app.backgroundTasks.idle()
})

t.test('a fault in the booking of a failure costs no other list', async t => {
  const { app, logs } = await start(t)
  await app.ready()
  const { runInAsyncScope } = AsyncResource.prototype
  t.teardown(() => { AsyncResource.prototype.runInAsyncScope = runInAsyncScope })
  app.backgroundTasks.addTask(async () => {
    await null
    AsyncResource.prototype.runInAsyncScope = () => { throw new Error('out of order') }
    throw new Error('x')
  })
  while (!logs.some(({ msg }) => msg.includes('could not be noted'))) await sleep(1)
  AsyncResource.prototype.runInAsyncScope = runInAsyncScope
  const next = app.backgroundTasks.addTask(() => {})
  await app.backgroundTasks.idle()
  t.equal(next.state, 'succeeded')
})

t.test('a fault in the booking of a success costs no other list', async t => {
  const { now } = Date
  t.teardown(() => { Date.now = now })
  const breaks = defineTask({
    name: 'breaks',
    async handler () {
      await null
      Date.now = () => { throw new Error('out of order') }
    }
  })
  const { app } = await start(t, { tasks: [breaks] }, { logger: false })
  await app.ready()
  const task = app.backgroundTasks.addTask(breaks)
  while (task.state !== 'succeeded') await sleep(1)
  Date.now = now
  const next = app.backgroundTasks.addTask(() => {})
  await app.backgroundTasks.idle()
  t.equal(next.state, 'succeeded')
})

t.test('an HTTP/2 answer may take longer than the time between two looks at its stream', async t => {
  const app = await build(t, { http2: true })
  const witness = new Witness()
  app.get('/', async request => {
    witness.add(request, 'task')
    await sleep(1_100)
    return 'done'
  })
  const session = http2.connect(`http://127.0.0.1:${await listen(app)}`)
  t.teardown(() => { session.destroy() })
  session.request({ ':path': '/' }).resume()
  while (app.backgroundTasks.length === 0) await sleep(1)
  await app.backgroundTasks.idle()
  t.strictSame(witness.take(), ['task'])
  t.strictSame(witness.outcome, COMPLETE)
})

t.test('a reply whose hijack cannot be replaced, and a request without a socket', async t => {
  const app = Fastify()
  app.addHook('onRequest', async (_request, reply) => { Object.defineProperty(reply, 'hijack', { value: reply.hijack, writable: false }) })
  await app.register(backgroundTasks, { closeTimeout: 100 })
  const witness = new Witness()
  app.get('/', async request => {
    witness.add(request, 'task')
    return 'done'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(witness.take(), ['task'])

  // Nobody will ever say that these responses are over.
  for (const upgrade of [false, true]) {
    const request = Object.assign(new http.IncomingMessage(undefined as never), { method: 'GET', url: '/', upgrade })
    app.routing(request, new http.ServerResponse(request))
  }
  await app.close()
  t.strictSame(witness.take(), ['task', 'task'])
})

t.test('a request that a hook before this plugin has frozen, and that is answered before its handler', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  app.addHook('onRequest', async request => { Object.freeze(request) })
  await app.register(backgroundTasks)
  const witness = new Witness()
  app.addHook('onRequest', (request, reply) => {
    witness.add(request, 'task')
    witness.add(request, 'another task')
    reply.send('done')
  })
  app.get('/', async () => 'not called')
  t.equal((await app.inject('/')).body, 'done')
  await app.backgroundTasks.idle()
  t.strictSame(witness.take(), ['task', 'another task'])
  t.strictSame(witness.outcome, COMPLETE)
})

t.test('a request with a body that a hook before this plugin has frozen, and that a hook answers by hand', async t => {
  const app = bare(t)
  app.addHook('onRequest', async request => { Object.freeze(request) })
  await app.register(backgroundTasks)
  const witness = new Witness()
  app.addHook('onRequest', (request, reply, _done) => {
    witness.add(request, 'task')
    reply.hijack()
    reply.raw.end('by hand')
  })
  app.post('/', async () => 'not called')
  const answered = await visit(t, app, witness, { path: '/', method: 'POST', body: 'body', outcome: COMPLETE })
  t.equal(String(answered?.body), 'by hand')
})

t.test('Retry-After goes out with a 503 only, and as an error handler has set it', async t => {
  for (const [status, given, expected] of [[503, undefined, '1'], [503, '60', '60'], [500, undefined, undefined]] as const) {
    const { app } = await start(t, { maxPending: 1 })
    app.setErrorHandler((_error, _request, reply) => {
      if (given !== undefined) reply.header('retry-after', given)
      return reply.code(status).send('full')
    })
    app.get('/', async request => {
      for (let i = 0; i < 2; i++) request.backgroundTasks.addTask(() => {})
    })
    const { statusCode, headers } = await app.inject('/')
    t.strictSame([statusCode, headers['retry-after']], [status, expected])
  }
})

t.test('a `when` that fails for a late task of a definition leaves the running task alone', async t => {
  const job = defineTask({ name: 'job', handler () {} })
  const { app, get } = await start(t, { tasks: [job], engine: new StubEngine() })
  let late: BackgroundTask | undefined
  app.get('/', async ({ backgroundTasks: tasks }) => {
    tasks.addTask(async () => {
      late = tasks.with({ when: ({ error }) => (error as Error).message === 'x' }).addTask(job)
      await null
    })
    return 'ok'
  })
  await get('/')
  await app.backgroundTasks.idle()
  t.equal(late?.state, 'failed')
  t.match(app.backgroundTasks.stats, { pending: 0, running: 0, succeeded: 1, failed: 1 })
})

t.test('what an engine cannot store runs here, whatever the logger does', async t => {
  let ran = 0
  const job = defineTask({ name: 'job', handler () { ran++ } })
  const engine = new StubEngine()
  engine.onEnqueue = async () => { throw new Error('away') }
  const { app } = await start(t, { tasks: [job], engine, fallback: 'local' })
  await app.ready()
  app.log.warn = () => { throw new Error('hostile') }
  await app.backgroundTasks.enqueue(job, undefined)
  await app.backgroundTasks.idle()
  t.equal(ran, 1)
})

t.test('a hook before this plugin that adds a task and answers by hand, over HTTP/2', async t => {
  const app = Fastify({ http2: true })
  t.teardown(() => app.close())
  const witness = new Witness()
  app.addHook('onRequest', (request, reply) => {
    witness.add(request as never, 'task')
    reply.hijack()
    reply.raw.end('by hand')
  })
  await app.register(backgroundTasks)
  app.get('/', async () => 'not called')
  const session = http2.connect(`http://127.0.0.1:${await listen(app as never)}`)
  t.teardown(() => { session.destroy() })
  session.request({ ':path': '/' }).resume()
  const sentAt = performance.now()
  // The task may have run before anybody looks at the list.
  while (witness.outcome === undefined) await sleep(1)
  await app.backgroundTasks.idle()
  t.ok(performance.now() - sentAt < 5_000, 'not after 10 s of silence')
  t.strictSame(witness.take(), ['task'])
  t.strictSame(witness.outcome, COMPLETE)
})

t.test('what only looks like a promise fails, and leaves no timer', async t => {
  const { app } = await start(t, { timeout: 60_000 })
  await app.ready()
  const timers = (): number => process.getActiveResourcesInfo().filter(name => name === 'Timeout').length
  const before = timers()
  const task = app.backgroundTasks.addTask(() => new Proxy(Promise.resolve(), {}))
  await app.backgroundTasks.idle()
  t.equal(task.state, 'failed')
  t.equal(timers(), before)
})

t.test('a definition added after the close, whose `when` is asynchronous and fails, is a 503 and no fault', async t => {
  const job = defineTask({ name: 'job', handler () {} })
  const { app } = await start(t, { tasks: [job] })
  const faults: unknown[] = []
  const note = (error: unknown): void => { faults.push(error) }
  process.on('unhandledRejection', note)
  t.teardown(() => { process.removeListener('unhandledRejection', note) })
  let closed = (): void => {}
  const whenClosed = new Promise<void>(resolve => { closed = resolve })
  for (const [path, when] of [['/rejects', async () => { throw new Error('when') }], ['/refuses', () => false]] as const) {
    app.get(path, async request => {
      await whenClosed
      request.backgroundTasks.with({ when: when as never }).addTask(job)
      return 'ok'
    })
  }
  const replies = ['/rejects', '/refuses'].map(path => app.inject(path))
  await sleep(5)
  await app.close()
  closed()
  t.strictSame((await Promise.all(replies)).map(({ statusCode }) => statusCode), [503, 200])
  await sleep(5)
  t.strictSame(faults, [])
})

t.test('a body that a hook before this plugin has read says nothing of the response', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  const witness = new Witness()
  app.addHook('onRequest', async request => {
    witness.add(request, 'task')
    for await (const chunk of request.raw) witness.note(String(chunk))
    await sleep(20)
  })
  await app.register(backgroundTasks)
  app.removeAllContentTypeParsers()
  app.addContentTypeParser('*', (_request, _payload, done) => { done(null) })
  app.post('/', async () => {
    witness.note('answer')
    return 'done'
  })
  await (await fetch(`http://127.0.0.1:${await listen(app)}`, { method: 'POST', body: 'body' })).text()
  await app.backgroundTasks.idle()
  t.strictSame(witness.take(), ['body', 'answer', 'task'])
  t.strictSame(witness.outcome, COMPLETE)
})

t.test('a job that is added after the reply was sent is stored immediately', async t => {
  const job = defineTask({ name: 'job', handler () {} })
  const engine = new StubEngine()
  const { app, address } = await start(t, { tasks: [job], engine })
  const body = new PassThrough()
  let task: BackgroundTask | undefined
  app.get('/', async (request, reply) => {
    body.write('first')
    reply.raw.once('pipe', () => { setImmediate(() => { task = request.backgroundTasks.addTask(job) }) })
    request.backgroundTasks.addTask(() => {})
    return await reply.send(body)
  })
  const answer = fetch(await address())
  while (task?.state !== 'enqueued') await sleep(1)
  body.end('last')
  t.equal(await (await answer).text(), 'firstlast')
})
