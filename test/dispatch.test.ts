import websocket from '@fastify/websocket'
import { Type } from '@sinclair/typebox'
import t from 'tap'
import { defineTask, type FastifyBackgroundTasksOptions } from '../lib/index.js'
import { deferred, start, type Started } from './support/app.js'
import { ownClock } from './support/clock.js'
import { StubEngine } from './support/stub-engine.js'

const turn = (): Promise<void> => new Promise(resolve => { setImmediate(resolve) })
const ran: string[] = []
const job = defineTask({ name: 'job', payload: Type.String(), handler (name) { ran.push(name) } })
t.beforeEach(() => { ran.length = 0 })

interface OnStub extends Started {
  engine: StubEngine
}

async function onStub (t: Parameters<typeof start>[0], options: FastifyBackgroundTasksOptions = {}, prepare: (engine: StubEngine) => void = () => {}): Promise<OnStub> {
  const engine = new StubEngine()
  prepare(engine)
  return { engine, ...await start(t, { tasks: [job], engine, enqueueTimeout: 100, ...options }) }
}

const refuse = async (): Promise<void> => { throw new Error('connection refused') }

t.test('a 202 means stored: the jobs of a request are stored in one call before its reply, with ids known before', async t => {
  const { app, engine } = await onStub(t)
  const gate = deferred()
  engine.onEnqueue = () => gate.promise
  app.addHook('preHandler', async request => { request.backgroundTasks.addTask(job, 'hook') })
  app.post('/', async (request, reply) => {
    request.backgroundTasks.addTask(() => { ran.push('function') })
    const task = request.backgroundTasks.addTask(job, 'route', { delay: 5 })
    return reply.code(202).send({ id: task.id, state: task.state })
  })
  let replied = false
  const injected = app.inject({ method: 'POST', url: '/', headers: { traceparent: '00-1-2-01' } }).then(reply => { replied = true; return reply })
  while (engine.calls.at(-1) !== 'enqueue') await turn()
  t.notOk(replied, 'the reply waits')
  t.ok(app.backgroundTasks.stats.oldestPendingMs > 0)
  gate.resolve()
  const { statusCode, body } = await injected
  await app.backgroundTasks.idle()
  t.equal(statusCode, 202)
  t.equal(engine.stored.length, 1)
  t.match(engine.stored[0], [
    { task: 'job', payload: 'hook', keyed: false, delayMs: 0, requestId: 'req-1', headers: { traceparent: '00-1-2-01' } },
    { task: 'job', payload: 'route', id: (JSON.parse(body) as { id: string }).id, delayMs: Number }
  ])
  t.strictSame(ran, ['function'], 'functions run here, jobs do not')
  t.match(app.backgroundTasks.stats, { enqueued: 2, succeeded: 1, pending: 0 })
})

t.test('a failed request stores nothing but what is for failures', async t => {
  const { app, engine } = await onStub(t)
  app.get('/', async request => {
    const cancelled = request.backgroundTasks.addTask(job, 'cancelled')
    request.backgroundTasks.addTask(job, 'success')
    request.backgroundTasks.with({ when: 'error' }).addTask(job, 'error')
    request.backgroundTasks.with({ when: ({ statusCode }) => statusCode === 500 }).addTask(job, 'status')
    request.backgroundTasks.with({ when () { throw new Error('when') } }).addTask(job, 'throws')
    cancelled.cancel()
    throw new Error('no')
  })
  t.equal((await app.inject('/')).statusCode, 500)
  await app.backgroundTasks.idle()
  t.strictSame(engine.stored.map(jobs => jobs.map(({ payload }) => payload)), [['error', 'status']])
  t.match(app.backgroundTasks.stats, { enqueued: 2, skipped: 2, failed: 1, pending: 0 })
})

t.test('what cannot be stored in time is a 503 with Retry-After, names itself in the log, and skips the request\'s functions', async t => {
  const failures: unknown[] = []
  const { app, engine, logs } = await onStub(t, { onError: (error, task) => { failures.push((error as { code: string }).code, task.name) } })
  app.get('/', async (request, reply) => {
    request.backgroundTasks.addTask(() => { ran.push('function') })
    const { id } = request.backgroundTasks.addTask(job, 'secret')
    reply.header('x-id', id).code(202)
    return { id }
  })
  app.register(async child => {
    // It forgets the headers of the error.
    child.setErrorHandler(async (error: { statusCode?: number }, _request, reply) => await reply.code(error.statusCode ?? 500).send('sorry'))
    child.get('/custom', async request => { request.backgroundTasks.addTask(job, 'secret') })
  })
  let seen = 0
  for (const [path, onEnqueue, reason] of [
    ['/', refuse, 'connection refused'],
    ['/', () => new Promise<void>(() => {}), 'the jobs were not stored within enqueueTimeout, 100 ms'],
    ['/custom', refuse, 'connection refused']
  ] as const) {
    engine.onEnqueue = onEnqueue
    const { statusCode, headers, body } = await app.inject(path)
    await app.backgroundTasks.idle()
    t.equal(statusCode, 503)
    t.equal(headers['retry-after'], '1')
    if (path === '/') t.match(JSON.parse(body), { code: 'FST_BGT_ENGINE_UNAVAILABLE', message: 'The background task engine "stub" is not available. Retry later' }, 'the client learns no host')
    t.match(logs.find(({ msg }, i) => i >= seen && msg === 'background task failed')?.err?.message, reason, 'the log says why')
    seen = logs.length
  }
  const lines = logs.filter(({ level, msg }) => level === 50 && msg === 'background task failed')
  t.match(lines, Array(3).fill({ task: { name: 'job', id: String }, err: { code: 'FST_BGT_ENGINE_UNAVAILABLE' } }))
  t.strictSame(ran, [], 'a store that fails is an error of the exchange')
  t.notMatch(JSON.stringify(logs), 'secret')
  t.strictSame(failures, Array(3).fill(['FST_BGT_ENGINE_UNAVAILABLE', 'job']).flat())
})

t.test('fallback: what cannot be stored runs here, under the id that was given out', async t => {
  const { app, engine, logs } = await onStub(t, { fallback: 'local', worker: false })
  engine.onEnqueue = refuse
  app.get('/', async request => ({ id: request.backgroundTasks.addTask(job, 'here').id }))
  const reply = await app.inject('/')
  await app.backgroundTasks.idle()
  const { id } = reply.json<{ id: string }>()
  t.equal(reply.statusCode, 200)
  t.strictSame(ran, ['here'])
  t.match(await app.backgroundTasks.get(job, id), { id, state: 'succeeded' })
  t.match(logs.filter(({ level }) => level === 40), [{ msg: 'background task could not be stored: it runs here', task: { id, name: 'job' } }])
  const receipt = await app.backgroundTasks.enqueue(job, 'enqueued', { key: 'k' })
  await app.backgroundTasks.idle()
  t.match(await app.backgroundTasks.get(job, receipt.id), { state: 'succeeded' })
  await t.rejects(app.backgroundTasks.enqueue(job, 'in a transaction', { tx: { executeSql: async () => ({}) } }), { code: 'FST_BGT_ENGINE_UNAVAILABLE' })
  t.strictSame(ran, ['here', 'enqueued'])
})

t.test('replies that never pass onSend, and late tasks, store at once; what cannot be is logged with name and id', async t => {
  const { app, engine, address, get, logs } = await onStub(t)
  await app.register(websocket)
  app.get('/hijack', (request, reply) => {
    request.backgroundTasks.addTask(job, 'before hijack')
    reply.hijack()
    request.backgroundTasks.addTask(job, 'after hijack')
    reply.raw.end('done')
  })
  app.get('/late', async (request, reply) => {
    request.backgroundTasks.addTask(() => { request.backgroundTasks.addTask(job, 'by a task') })
    await reply.send('done')
    request.backgroundTasks.addTask(job, 'after the reply')
  })
  const upgraded = deferred()
  app.get('/ws', { websocket: true }, (socket, request) => {
    request.backgroundTasks.addTask(job, 'on a websocket')
    socket.close()
    socket.on('close', upgraded.resolve)
  })
  const payloads = (): unknown[] => engine.stored.flat().map(({ payload }) => payload)
  await get('/hijack')
  await app.backgroundTasks.idle()
  t.strictSame(payloads(), ['before hijack', 'after hijack'])
  await get('/late')
  await app.backgroundTasks.idle()
  t.strictSame(payloads().slice(2).sort(), ['after the reply', 'by a task'])
  const { WebSocket } = await import('ws')
  const client = new WebSocket(`${(await address()).replace('http', 'ws')}/ws`)
  client.on('error', () => {})
  await upgraded.promise
  await app.backgroundTasks.idle()
  t.equal(payloads().at(-1), 'on a websocket')
  engine.onEnqueue = refuse
  await get('/hijack')
  await app.backgroundTasks.idle()
  t.match(logs.filter(({ level }) => level === 50), [
    { msg: 'background task failed', task: { name: 'job' }, err: { code: 'FST_BGT_ENGINE_UNAVAILABLE' } },
    { msg: 'background task failed', task: { name: 'job' }, err: { code: 'FST_BGT_ENGINE_UNAVAILABLE' } }
  ])
})

t.test('a task that is cancelled while it is being stored stays skipped', async t => {
  const { app, engine } = await onStub(t)
  const isCalled = deferred()
  const gate = deferred()
  engine.onEnqueue = async () => { isCalled.resolve(); await gate.promise }
  app.get('/', async request => {
    const task = request.backgroundTasks.addTask(job, 'cancelled')
    request.backgroundTasks.addTask(job, 'refused')
    engine.onEnqueue = async () => {
      task.cancel()
      throw new Error('no')
    }
  })
  await app.ready()
  const tasks = [app.backgroundTasks.addTask(job, 'cancelled'), app.backgroundTasks.addTask(job, 'stored')]
  await isCalled.promise
  t.ok(tasks[0]?.cancel())
  gate.resolve()
  await app.backgroundTasks.idle()
  t.strictSame(tasks.map(task => task.state), ['skipped', 'enqueued'])

  t.equal((await app.inject('/')).statusCode, 503)
  await app.backgroundTasks.idle()
  t.match(app.backgroundTasks.stats, { pending: 0, enqueued: 1, skipped: 2, failed: 1 }, 'also where the store fails')
})

t.test('what is added behind the store goes by the exchange so far', async t => {
  const { app, engine } = await onStub(t)
  app.get('/', async request => {
    request.backgroundTasks.with({ when: 'always' }).addTask(job, 'before')
    throw new Error('no')
  })
  app.addHook('onSend', async request => { request.backgroundTasks.addTask(job, 'behind') })
  t.equal((await app.inject('/')).statusCode, 500)
  await app.backgroundTasks.idle()
  t.strictSame(engine.stored.flat().map(({ payload }) => payload), ['before'])
  t.match(app.backgroundTasks.stats, { enqueued: 1, skipped: 1, pending: 0 })
})

t.test('a cleanup waits for the tasks that are being stored', async t => {
  const { app, engine, get } = await onStub(t)
  app.get('/', async (request, reply) => {
    await reply.send('done')
    request.backgroundTasks.addCleanup(() => { ran.push(`cleanup behind ${engine.stored.length}`) })
    request.backgroundTasks.addTask(job, 'late')
  })
  engine.onEnqueue = async () => { await turn(); await turn() }
  await get('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['cleanup behind 1'])
})

t.test('an engine that is away: the app starts with a warning, answers 503, and recovers by itself', async t => {
  let isAway = true
  const { app, engine, logs } = await onStub(t, { enqueueTimeout: 50 }, engine => { engine.onStart = async () => { if (isAway) await refuse() } })
  app.get('/', async request => { request.backgroundTasks.addTask(job, 'job') })
  app.get('/none', async () => 'served')
  const from = Date.now()
  await app.ready()
  t.ok(Date.now() - from < 1_000)
  t.match(logs.filter(({ level }) => level === 40).map(({ msg }) => msg), [
    'background task engine "stub": connection refused',
    'background task engine "stub" is not available after 50 ms (connection refused): the app starts, and goes on trying'
  ])
  t.equal((await app.inject('/none')).body, 'served')
  t.equal((await app.inject('/')).statusCode, 503)
  isAway = false
  while (engine.run === undefined) await new Promise(resolve => { setTimeout(resolve, 20) })
  t.equal((await app.inject('/')).statusCode, 200)
  t.equal(engine.stored.length, 1, 'what was answered with 503 is not stored when the engine is there')
  engine.report?.(new Error('connection reset'))
  engine.report?.(new Error('connection reset'))
  t.equal(logs.filter(({ msg }) => msg.includes('reset')).length, 1, 'the same trouble is said once')
})

t.test('what comes while the engine is being reached waits for it, and one that is not wanted is not stored', async t => {
  const { app, engine } = await onStub(t, {}, engine => { engine.onStart = async () => { await new Promise(resolve => { setTimeout(resolve, 30) }) } })
  app.get('/', async request => {
    request.backgroundTasks.addTask(job, 'success')
    throw new Error('no')
  })
  const [record, receipt] = await Promise.all([app.backgroundTasks.get(job, 'nobody'), app.backgroundTasks.enqueue(job, 'early')])
  t.equal(record, undefined)
  t.match(receipt, { duplicate: false })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(engine.stored.map(jobs => jobs.map(({ payload }) => payload)), [['early']])
})

t.test('concurrent requests share a call where the engine wants groups; one alone waits for nobody', async t => {
  const { app, engine } = await onStub(t, { enqueueTimeout: 5_000 }, engine => { engine.groups = true })
  const gates = [deferred(), deferred(), deferred()]
  const underWay = new Set<string>()
  let calls = 0
  engine.onEnqueue = async jobs => {
    for (const { id } of jobs) {
      t.notOk(underWay.has(id), 'no id is stored twice at once')
      underWay.add(id)
    }
    await gates[calls++]?.promise
    for (const { id } of jobs) underWay.delete(id)
    if (jobs.some(({ payload }) => payload === 'refused')) await refuse()
  }
  app.get<{ Params: { name: string } }>('/:name', async request => { request.backgroundTasks.addTask(job, request.params.name, { key: request.params.name }) })
  await app.ready()
  const get = async (name: string): Promise<number> => (await app.inject(`/${name}`)).statusCode
  const turns = async (): Promise<void> => { for (let i = 0; i < 20; i++) await turn() }
  const replies = [get('a')]
  await turns()
  t.equal(calls, 1, 'one alone waits for nobody')
  replies.push(get('b'))
  await turns()
  t.equal(calls, 2, 'a second call that is as large goes beside the first')
  replies.push(...['c', 'a', 'd', 'refused', 'd'].map(get))
  await turns()
  t.equal(calls, 2, 'the next group gathers while two are under way')
  gates[0]?.resolve()
  await turns()
  t.equal(calls, 3)
  gates[1]?.resolve()
  replies.push(get('e'))
  await turns()
  t.equal(calls, 3, 'not beside a larger one')
  gates[2]?.resolve()
  t.strictSame(await Promise.all(replies), [200, 200, 200, 200, 200, 503, 200, 200], 'a job that is refused fails no stranger')
  const groups = engine.stored.map(jobs => jobs.map(({ payload }) => payload))
  t.strictSame(groups.slice(0, 2), [['a'], ['b']])
  t.strictSame(groups.slice(2).sort(), [['a'], ['c'], ['d'], ['d', 'e']], 'the group was refused and stored one by one; a repeated id waits for its own call')
  gates.length = 0
  engine.onEnqueue = async () => { await turn() }
  engine.stored.length = 0
  await Promise.all(Array.from({ length: 1_200 }, (_, i) => get(String(i))))
  t.equal(engine.stored.flat().length, 1_200)
  t.ok(Math.max(...engine.stored.map(jobs => jobs.length)) <= 500, 'groups are bounded')
  t.ok(engine.stored.length < 100)
  engine.stored.length = 0
  await Promise.all(Array.from({ length: 20 }, () => app.backgroundTasks.enqueue(job, 'x'.repeat(1_500_000))))
  t.equal(Math.max(...engine.stored.map(jobs => jobs.length)), 2, 'in size, too')
})

t.test('enqueue stores at once, in the transaction of the caller', async t => {
  const { app, engine } = await onStub(t)
  await app.ready()
  const tx = { executeSql: async () => ({}) }
  const receipt = await app.backgroundTasks.enqueue(job, 'in tx', { tx, key: 'k', delay: 1_000 })
  t.match(receipt, { id: /^[0-9a-f-]{36}$/, duplicate: false })
  t.strictSame(await app.backgroundTasks.enqueue(job, 'again', { key: 'k' }), { id: receipt.id, duplicate: true })
  t.match(engine.transactions, [{ executeSql: Function }, undefined])
  t.match(engine.stored[0], [{ keyed: true, payload: 'in tx' }])
  t.equal(app.backgroundTasks.stats.enqueued, 1)
  t.match(await app.backgroundTasks.get(job, receipt.id), { state: 'pending' })
  await t.rejects(app.backgroundTasks.enqueue(job, 'x', { tx: 1 as never }), { code: 'FST_BGT_INVALID_OPTION', message: /"tx" of enqueue accepts/ })
})

t.test('a route that awaits an enqueue which cannot store answers 503 by itself', async t => {
  const { app, engine } = await onStub(t)
  engine.onEnqueue = refuse
  app.get('/', async () => await app.backgroundTasks.enqueue(job, 'x'))
  const { statusCode, headers } = await app.inject('/')
  t.strictSame([statusCode, headers['retry-after']], [503, '1'])
})

t.test('what an engine cannot do is refused at the call', async t => {
  const { app } = await onStub(t, {}, engine => { Object.assign(engine, { supports: { delay: false, key: false, tx: false, get: false } }) })
  for (const options of [{ delay: 1 }, { key: 'k' }]) {
    t.throws(() => app.backgroundTasks.addTask(job, 'x', options), { code: 'FST_BGT_UNSUPPORTED', statusCode: 500, message: `stub does not support "${Object.keys(options)[0]}", which was asked for the task "job"; it supports none of its kind` })
  }
  await t.rejects(app.backgroundTasks.get(job, 'id'), { code: 'FST_BGT_UNSUPPORTED' })
  await t.rejects(app.backgroundTasks.enqueue(job, 'x', { tx: { executeSql: async () => ({}) } }), { code: 'FST_BGT_UNSUPPORTED' })
})

t.test('a worker turns each end of an attempt into its verdict', async t => {
  const told: unknown[] = []
  const gate = deferred()
  const work = defineTask({
    name: 'work',
    payload: Type.Object({ do: Type.String() }),
    timeout: 50,
    retry: { attempts: 3, backoff: { delay: 10 } },
    async handler (payload, { id, attempt, headers, requestId, log, app }) {
      told.push([id, attempt, headers, requestId, typeof log.info, app.backgroundTasks !== undefined])
      if (payload.do === 'throw') throw Object.assign(new Error('no'), { code: 'E' })
      if (payload.do === 'hang') await gate.promise
      return { did: payload.do }
    },
    onFailed (payload, error, { attempts }) { told.push(['onFailed', payload, (error as Error).message, attempts]) }
  })
  const { app, engine, logs } = await onStub(t, { tasks: [work] })
  await app.ready()
  // One line each, and no other error.
  const failed = (): number => logs.filter(({ level }) => level === 50).length
  const task = 'work'
  t.match(engine.specs, [{ name: 'work', attempts: 3, timeout: 50, keep: { succeeded: 3_600, failed: 604_800 }, concurrency: 10 }])
  t.strictSame(await engine.deliver({ task, id: 'a', payload: { do: 'it' }, headers: { h: '1' }, requestId: 'req-7' }), { kind: 'done', result: { did: 'it' } })
  t.strictSame(told.splice(0), [['a', 1, { h: '1' }, 'req-7', 'function', true]])
  t.strictSame(await engine.deliver({ task, payload: { do: 'throw' }, attempt: 2 }), { kind: 'retry', error: { name: 'Error', message: 'no', code: 'E' }, delayMs: 20 })
  t.match(await engine.deliver({ task, payload: { do: 'hang' } }), { kind: 'retry', error: { code: 'FST_BGT_TIMEOUT' } })
  t.equal(failed(), 0)
  told.length = 0
  t.strictSame(await engine.deliver({ task, payload: { do: 'throw' }, attempt: 3 }), { kind: 'failed', error: { name: 'Error', message: 'no', code: 'E' } })
  t.strictSame(told.splice(0).at(-1), ['onFailed', { do: 'throw' }, 'no', 3])
  t.equal(failed(), 1)
  // It killed its process each time.
  t.match(await engine.deliver({ task, payload: { do: 'it' }, attempt: 4 }), { kind: 'failed', error: { message: /died/ } })
  t.strictSame(told.splice(0), [['onFailed', { do: 'it' }, 'no attempt is left: the process that ran the last one died', 3]])
  t.match(logs.findLast(({ msg }) => msg === 'background task failed'), { task: { name: 'work', attempt: 3 } }, 'no line shows more attempts than there are')
  // Written by hand.
  t.match(await engine.deliver({ task, payload: { do: 7 }, requestId: 'req-8' }), { kind: 'failed', error: { code: 'FST_BGT_INVALID_PAYLOAD', message: /\/do must be string/ } })
  t.match(logs.findLast(({ msg }) => msg === 'background task failed'), { reqId: 'req-8', task: { name: 'work' } }, 'as the lines of the request were')
  t.match(await engine.deliver({ task, payload: undefined, enqueuedAt: undefined as never }), { kind: 'failed' })
  t.strictSame(told, [], 'onFailed is not called with an invalid payload')
  t.equal(failed(), 4)
  t.ok(logs.every(({ level, msg }) => level < 50 || msg === 'background task failed'))
  t.strictSame(await engine.deliver({ task: 'unknown' }), { kind: 'released' })
  t.match(app.backgroundTasks.stats, { pending: 0, running: 0, succeeded: 1, failed: 4 })
  gate.resolve()
})

t.test('a shutdown takes no further jobs, stores what its last tasks add, and returns what does not end in time', async t => {
  const hang = defineTask({ name: 'hang', async handler () { await new Promise(() => {}) } })
  const closing = deferred()
  const quick = defineTask({ name: 'quick', async handler (_: undefined, { app }) { await closing.promise; app.backgroundTasks.addTask(job, 'by a job') } })
  const { app, engine, logs } = await onStub(t, { tasks: [job, hang, quick], closeTimeout: 100 }, engine => {
    const pause = engine.pause.bind(engine)
    engine.pause = async () => { await pause(); closing.resolve() }
  })
  await app.ready()
  const verdicts = [engine.deliver({ task: 'hang', id: 'h' }), engine.deliver({ task: 'quick', id: 'q' })]
  await turn()
  await app.close()
  t.match(await Promise.all(verdicts), [{ kind: 'released' }, { kind: 'done' }])
  t.strictSame(engine.calls, ['start', 'consume', 'pause', 'enqueue', 'stop'])
  t.strictSame(logs.filter(({ level }) => level === 50), [], 'nothing is lost, so nothing is named')
  t.strictSame(await engine.deliver({ task: 'hang' }), { kind: 'released' })
  await t.rejects(app.backgroundTasks.get(job, 'id'), { code: 'FST_BGT_CLOSED' })
})

t.test('an engine that fails to pause, to answer or to stop is said, and holds up nothing', async t => {
  const { app, engine, logs } = await onStub(t, {}, engine => {
    engine.pause = refuse
    engine.get = () => new Promise(() => {})
    // eslint-disable-next-line no-throw-literal
    engine.onStop = async () => { throw 'not an error' }
  })
  await app.ready()
  await t.rejects(app.backgroundTasks.get(job, 'id'), { code: 'FST_BGT_ENGINE_UNAVAILABLE', cause: { message: 'it did not answer within enqueueTimeout, 100 ms' } })
  engine.report?.(new AggregateError([], ''))
  engine.report?.(Object.assign(new Error(''), { code: 'ECONNREFUSED' }))
  await app.close()
  t.strictSame(logs.filter(({ level }) => level === 40).map(({ msg }) => msg), [
    'background task engine "stub": AggregateError',
    'background task engine "stub": ECONNREFUSED',
    'background task engine "stub" failed to pause: connection refused',
    'background task engine "stub" failed to stop: not an error'
  ])
})

t.test('a shutdown leaves no promise behind, whatever the engine does', async t => {
  const { app, engine } = await onStub(t, { enqueueTimeout: 60_000, closeTimeout: 50 }, engine => { engine.onStart = () => new Promise(() => {}) })
  const enqueued = app.backgroundTasks.enqueue(job, 'never')
  const refused = t.rejects(enqueued, { code: 'FST_BGT_ENGINE_UNAVAILABLE' })
  await turn()
  const from = Date.now()
  await app.close()
  await refused
  t.ok(Date.now() - from < 5_000, 'an engine that is still being started does not hold it up')
  t.strictSame(engine.calls, ['start', 'stop'], 'and is told to let go')
})

t.test('an engine that comes up during the drain is given nothing to run', async t => {
  const up = deferred()
  const isDraining = deferred()
  const { app, engine } = await onStub(t, {}, engine => { engine.onStart = () => up.promise })
  await app.ready()
  // The drain says what it waits for, once it has paused the engine.
  app.log.info = (() => { isDraining.resolve() }) as typeof app.log.info
  app.backgroundTasks.addTask(async () => {
    await isDraining.promise
    up.resolve()
    for (let i = 0; i < 10; i++) await turn()
  })
  await app.close()
  t.strictSame(engine.calls, ['start', 'stop'])
})

t.test('a group that was abandoned is not stored when its turn comes, nor one by one', async t => {
  const { app, engine } = await onStub(t, { enqueueTimeout: 60 }, engine => { engine.groups = true })
  const gate = deferred()
  let calls = 0
  engine.onEnqueue = async () => { if (calls++ < 2) await gate.promise }
  await app.ready()
  const late = ['a', 'b', 'c'].map(async name => { await t.rejects(app.backgroundTasks.enqueue(job, name), { code: 'FST_BGT_ENGINE_UNAVAILABLE' }) })
  await Promise.all(late)
  gate.resolve()
  for (let i = 0; i < 5; i++) await turn()
  t.strictSame(engine.stored.map(jobs => jobs.map(({ payload }) => payload)), [['a'], ['b']])
  calls = 0
  engine.onEnqueue = async jobs => {
    if (calls++ < 2) await turn()
    if (jobs.length > 1) {
      await new Promise(resolve => { setTimeout(resolve, 100) })
      await refuse()
    }
  }
  await Promise.all(['d', 'e', 'f', 'g'].map(async name => { await app.backgroundTasks.enqueue(job, name).catch(() => {}) }))
  await new Promise(resolve => { setTimeout(resolve, 100) })
  t.strictSame(engine.stored.slice(2).map(jobs => jobs.map(({ payload }) => payload)), [['d'], ['e']])
  engine.onEnqueue = refuse
  await t.rejects(app.backgroundTasks.enqueue(job, 'h'), { cause: { message: 'connection refused' } })
})

t.test('an engine that throws at the call is an engine that fails', async t => {
  const { app, engine } = await onStub(t, { worker: false })
  engine.enqueue = () => { throw new Error('a mistake') }
  app.get('/', async request => { request.backgroundTasks.addTask(job, 'x') })
  const reply = await app.inject('/')
  t.equal(reply.statusCode, 503)
  t.hasProp(reply.headers, 'retry-after')
  await t.rejects(app.backgroundTasks.enqueue(job, 'y'), { code: 'FST_BGT_ENGINE_UNAVAILABLE', cause: { message: 'a mistake' } })
  t.equal(app.backgroundTasks.stats.pending, 0)
  const grouped = await onStub(t, { worker: false }, engine => { engine.groups = true })
  grouped.engine.enqueue = () => { throw new Error('a mistake') }
  // The last ones are a group, and then tried one by one.
  const refused = ['a', 'b', 'c', 'd'].map(async name => {
    await t.rejects(grouped.app.backgroundTasks.enqueue(job, name), { code: 'FST_BGT_ENGINE_UNAVAILABLE', cause: { message: 'a mistake' } })
  })
  await Promise.all(refused)
})

t.test('a delivery that waits for its turn goes back at the deadline, too', async t => {
  const hang = defineTask({ name: 'hang', async handler () { await new Promise(() => {}) } })
  const { app, engine, logs } = await onStub(t, { tasks: [hang], closeTimeout: 50, concurrency: 1 })
  await app.ready()
  const verdicts = [engine.deliver({ task: 'hang', id: '1' }), engine.deliver({ task: 'hang', id: '2', requestId: 'r' })]
  await turn()
  t.match(app.backgroundTasks.stats, { running: 1, pending: 1 })
  await app.close()
  t.match(await Promise.all(verdicts), [{ kind: 'released' }, { kind: 'released' }])
  t.match(logs.filter(({ msg }) => msg.includes('returned to their engine')), [{
    level: 30,
    msg: /^background tasks returned to their engine, because .*: hang, hang$/,
    tasks: [{ id: '1', name: 'hang', attempt: 1 }, { id: '2', requestId: 'r' }]
  }], 'in one line')
  t.notMatch(logs, [{ msg: /abandoned/ }])
})

t.test('a delivery starts at once if it is the first of its turn of the event loop, and none waits before it', async t => {
  const { app, engine } = await onStub(t)
  await app.ready()
  // A turn that has lasted too long leaves the rest to the next one: none does.
  ownClock(t)
  const verdicts = ['first', 'second', 'third'].map(payload => engine.deliver({ task: 'job', payload }))
  t.strictSame(ran, ['first'])
  app.backgroundTasks.addTask(() => { ran.push('function') })
  await turn()
  t.strictSame(ran, ['first', 'second', 'third', 'function'])
  app.backgroundTasks.addTask(() => { ran.push('function') })
  verdicts.push(engine.deliver({ task: 'job', payload: 'behind' }))
  t.equal(ran.length, 4)
  await turn()
  t.strictSame(ran.slice(4), ['function', 'behind'])
  verdicts.push(engine.deliver({ task: 'job', payload: 'first again' }))
  t.equal(ran.at(-1), 'first again')
  t.strictSame(await Promise.all(verdicts), verdicts.map(() => ({ kind: 'done', result: null })))

  const seats = await onStub(t, { concurrency: 1 })
  await seats.app.ready()
  ran.length = 0
  const gate = deferred()
  seats.app.backgroundTasks.addTask(async () => { await gate.promise; ran.push('function') })
  await turn()
  const verdict = seats.engine.deliver({ task: 'job', payload: 'no seat' })
  await turn()
  t.strictSame(ran, [])
  gate.resolve()
  await verdict
  t.strictSame(ran, ['function', 'no seat'])
})

t.test('a worker that cannot begin tries again, on the connection that it has', async t => {
  const { app, engine, logs } = await onStub(t, {}, engine => {
    engine.onConsume = async () => {
      engine.onConsume = async () => {}
      await refuse()
    }
  })
  await app.ready()
  while (engine.run === undefined) await turn()
  t.strictSame(engine.calls, ['start', 'consume', 'consume'])
  t.match(logs.filter(({ level }) => level === 40), [{ msg: 'background task engine "stub": connection refused' }])
  t.equal(logs.filter(({ msg }) => msg === 'background task engine "stub" is connected').length, 1)
})

t.test('a web process does not consume; concurrency is by name', async t => {
  const web = await onStub(t, { worker: false })
  await web.app.ready()
  t.strictSame(web.engine.calls, ['start'])
  const worker = await onStub(t, { worker: { concurrency: { job: 50 } } })
  await worker.app.ready()
  t.match(worker.engine.specs, [{ concurrency: 50 }])
  const plain = await onStub(t, { worker: { concurrency: 3 } })
  await plain.app.ready()
  t.match(plain.engine.specs, [{ concurrency: 3 }])
  for (const [options, message] of [
    [{ worker: 1 }, /"worker" of register accepts a boolean or { concurrency }/],
    [{ worker: { concurrency: 0 } }, /"concurrency" of worker accepts/],
    [{ worker: { concurrency: { nobody: 1 } } }, /concurrency of worker has no option "nobody"; it accepts job/],
    [{ tasks: [], worker: { concurrency: { job: 1 } } }, /concurrency of worker has no option "job"; it accepts none$/],
    [{ engine: {} }, /"engine" of register accepts an engine/],
    [{ enqueueTimeout: 0 }, /"enqueueTimeout"/],
    [{ fallback: 'remote' }, /"fallback" of register accepts 'local'/],
    [{ tasks: job }, /"tasks" of register accepts an array/]
  ] as Array<[object, RegExp]>) {
    await t.rejects(start(t, { tasks: [job], ...options }), { code: 'FST_BGT_INVALID_OPTION', message })
  }
})

t.test('what Fastify refuses to send after the last onSend hook promises nothing: no job is stored', async t => {
  const { app, engine } = await onStub(t)
  const consumed = new Response('x')
  await consumed.text()
  const locked = new ReadableStream()
  locked.getReader()
  const refused: Record<string, unknown> = { '/object': {}, '/response': consumed, '/locked': locked }
  const sent: Record<string, unknown> = {
    '/text': 'x', '/buffer': Buffer.from('x'), '/null': null, '/new': new Response('x'), '/empty': new Response(null), '/web': new Response('x').body
  }
  app.get('*', async (request, reply) => {
    request.backgroundTasks.addTask(job, request.url)
    return reply.type('text/html').send(refused[request.url] ?? sent[request.url])
  })
  for (const url of Object.keys(refused)) t.equal((await app.inject(url)).statusCode, 500, url)
  await app.backgroundTasks.idle()
  t.same(engine.stored, [])
  for (const url of Object.keys(sent)) t.equal((await app.inject(url)).statusCode, 200, url)
  await app.backgroundTasks.idle()
  t.same(engine.stored.flat().map(({ payload }) => payload), Object.keys(sent))
})

t.test('the id of a request is a text wherever its job runs, whatever genReqId returns', async t => {
  const seen: unknown[] = []
  const job = defineTask({ name: 'job', handler (_payload, { requestId }) { seen.push(requestId) } })
  const genReqId = (): string => 7 as unknown as string
  const local = await start(t, { tasks: [job] }, { genReqId })
  const engine = new StubEngine()
  const stub = await start(t, { tasks: [job], engine }, { genReqId })
  for (const { app } of [local, stub]) {
    app.get('/', async request => { request.backgroundTasks.addTask(job) })
    await app.inject('/')
    await app.backgroundTasks.idle()
  }
  t.same(seen, ['7'])
  t.match(engine.stored, [[{ requestId: '7' }]])
})

t.test('an engine that rejects with an error that cannot be read is a 503 as any other, and the process hears nothing', async t => {
  const unhandled: unknown[] = []
  const note = (error: unknown): void => { unhandled.push(error) }
  process.on('unhandledRejection', note)
  t.teardown(() => { process.removeListener('unhandledRejection', note) })
  const { app, engine } = await onStub(t)
  engine.onEnqueue = async () => { throw Object.defineProperty(new Error(), 'message', { get () { throw new Error('no') } }) }
  app.get('/', async request => { request.backgroundTasks.addTask(job, 'x') })
  const { statusCode, headers, body } = await app.inject('/')
  t.equal(statusCode, 503)
  t.equal(headers['retry-after'], '1')
  t.match(body, 'FST_BGT_ENGINE_UNAVAILABLE')
  await turn()
  t.same(unhandled, [])
})
