import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
import * as fastify from 'fastify'
import t from 'tap'
import backgroundTasks, { defineTask, type FastifyBackgroundTasksOptions } from '../lib/index.js'
import { recordTasks } from '../lib/testing.js'
import { collectLogs, deferred, start } from './support/app.js'
import { ownClock } from './support/clock.js'
import { StubEngine } from './support/stub-engine.js'

const job = defineTask({ name: 'job', handler () {} })

interface OnStub extends Awaited<ReturnType<typeof start>> {
  engine: StubEngine
}

async function onStub (t: Parameters<typeof start>[0], options: FastifyBackgroundTasksOptions = {}, engine = new StubEngine(), server: FastifyServerOptions = {}): Promise<OnStub> {
  return { engine, ...await start(t, { tasks: [job], engine, enqueueTimeout: 100, ...options }, server) }
}

t.test('an engine object serves one app at a time', async t => {
  const refused = { code: 'FST_BGT_INVALID_OPTION', message: /^fastify-background-tasks: The option "engine" accepts an engine that no other app uses/ }
  const engine = new StubEngine()
  const [api, admin] = [(await onStub(t, {}, engine)).app, (await onStub(t, {}, engine)).app]
  await api.ready()
  await t.rejects(async () => { await admin.ready() }, refused, 'the second one is not ready')
  await t.rejects(admin.backgroundTasks.enqueue(job, 1), refused, 'and stores nothing')
  await t.rejects(async () => { await Fastify().register(backgroundTasks, { tasks: [job], engine }) }, refused, 'a third one is refused at register')
  await admin.close()
  await api.backgroundTasks.enqueue(job, 1)
  t.equal(engine.stored.length, 1, 'the first one goes on when the others close')
  await api.close()
  const { app } = await onStub(t, {}, engine)
  await app.ready()
  await app.backgroundTasks.enqueue(job, 2)
  t.equal(engine.stored.length, 2, 'after the close another app can use it')

  const recorded = Fastify()
  recordTasks(recorded)
  await t.rejects(async () => { await recorded.register(backgroundTasks, { tasks: [job], engine }) }, refused)
  const [first, second] = [new StubEngine(), Fastify()]
  const recording = (await onStub(t, {}, first)).app
  recordTasks(second)
  await second.register(backgroundTasks, { tasks: [job], engine: first })
  await second.ready()
  await recording.ready()
  await second.close()
  t.strictSame(first.calls.filter(call => call !== 'consume'), ['start'], 'an app that records does not use it')
})

t.test('one outage is one warning for each message, however often it comes, and the next outage is another', async t => {
  const clock = ownClock(t)
  const { app, engine, logs } = await onStub(t, { enqueueTimeout: 60_000 })
  await app.ready()
  const warnings = (): string[] => logs.filter(({ level }) => level === 40).map(({ msg }) => msg).splice(0)
  for (let second = 0; second < 60; second++) {
    for (let definition = 0; definition < 3; definition++) engine.report?.(new Error('connect ECONNREFUSED'))
    engine.report?.(new Error('READONLY'))
    await clock.pass(1_000)
  }
  t.strictSame(warnings(), ['background task engine "stub": connect ECONNREFUSED', 'background task engine "stub": READONLY'])
  await clock.pass(30_000)
  engine.report?.(new Error('READONLY'))
  t.equal(warnings().length, 3)
  for (let i = 0; i < 150; i++) engine.report?.(new Error(`message ${i}`))
  t.equal(warnings().length, 153, 'messages that are never the same fill no memory')
})

t.test('what can never be stored is the mistake of its own request, and no 503', async t => {
  for (const groups of [false, true]) {
    const { app, engine, logs } = await onStub(t, {}, Object.assign(new StubEngine(), { groups }))
    engine.onEnqueue = async jobs => {
      if (jobs.some(({ payload }) => payload === 'large')) throw Object.assign(new Error('The payload of the task "job" cannot be stored: it is too large'), { code: 'FST_BGT_INVALID_PAYLOAD', statusCode: 500 })
    }
    app.get<{ Params: { what: string } }>('/:what', async (request, reply) => {
      request.backgroundTasks.addTask(job, request.params.what)
      return await reply.code(202).send('stored')
    })
    const replies = await Promise.all(['a', 'large', 'b', 'c'].map(async what => await app.inject(`/${what}`)))
    t.strictSame(replies.map(({ statusCode }) => statusCode), [202, 500, 202, 202])
    t.match(replies[1]?.json(), { code: 'FST_BGT_INVALID_PAYLOAD', message: /too large/ })
    t.equal(replies[1]?.headers['retry-after'], undefined)
    t.match(logs.filter(({ level, msg }) => level === 50 && msg === 'background task failed'), [{ err: { code: 'FST_BGT_INVALID_PAYLOAD' } }])
    await t.rejects(app.backgroundTasks.enqueue(job, 'large'), { code: 'FST_BGT_INVALID_PAYLOAD' })
  }
})

t.test('an error of the caller\'s transaction is the caller\'s, and nothing runs in a transaction after its call', async t => {
  const { app, engine } = await onStub(t)
  let transaction: { executeSql: (text: string) => Promise<{ rows: unknown[] }> } | undefined
  engine.enqueue = async (_jobs, options) => {
    transaction = (options as { tx: typeof transaction }).tx
    try {
      await transaction?.executeSql('insert')
    } catch {
      throw new Error('pg says something')
    }
    return []
  }
  const own = new Error('current transaction is aborted')
  await t.rejects(app.backgroundTasks.enqueue(job, 1, { tx: { executeSql: async () => { throw own } } }), own)
  await t.rejects(app.backgroundTasks.enqueue(job, 1, { tx: { executeSql () { throw own } } }), own)
  for (const result of [undefined, null, 7, {}, { rows: 1 }]) {
    await t.rejects(app.backgroundTasks.enqueue(job, 1, { tx: { executeSql: async () => result } }), { code: 'FST_BGT_INVALID_OPTION', message: /executeSql that resolves to \{ rows: \[\.\.\.\] \}; it resolved to/ })
  }
  const statements: string[] = []
  const answer = deferred()
  const tx = {
    async executeSql (text: string) {
      statements.push(text)
      await answer.promise
      return { rows: [{}] }
    }
  }
  await t.rejects(app.backgroundTasks.enqueue(job, 1, { tx }), { code: 'FST_BGT_ENGINE_UNAVAILABLE', cause: { message: /within enqueueTimeout/ } })
  await t.rejects(async () => { await transaction?.executeSql('too late') }, /enqueue has settled/)
  answer.resolve()
  t.strictSame(statements, ['insert'])
})

t.test('jobs that an engine has delivered do not count for maxPending', async t => {
  let gate = deferred()
  const long = defineTask({ name: 'long', async handler () { await gate.promise } })
  const { app, engine } = await onStub(t, { tasks: [job, long], maxPending: 2 })
  app.get('/', async request => { request.backgroundTasks.addTask(() => gate.promise) })
  await app.ready()
  const verdicts = Array.from({ length: 5 }, (_, i) => engine.deliver({ task: 'long', id: String(i) }))
  t.equal((await app.inject('/')).statusCode, 200)
  t.equal((await app.inject('/')).statusCode, 200)
  t.equal((await app.inject('/')).statusCode, 503, 'functions of this process do')
  const { pending, running } = app.backgroundTasks.stats
  t.equal(pending + running, 7)
  gate.resolve()
  t.strictSame((await Promise.all(verdicts)).map(({ kind }) => kind), Array(5).fill('done'))
  await app.backgroundTasks.idle()
  gate = deferred()
  t.strictSame([(await app.inject('/')).statusCode, (await app.inject('/')).statusCode, (await app.inject('/')).statusCode], [200, 200, 503])
  gate.resolve()
})

t.test('an onFailed or onError that never settles holds up the next task for 30 s, and a job of an engine ends', async t => {
  const clock = ownClock(t)
  const ran: string[] = []
  const never = defineTask({ name: 'never', retry: { attempts: 1 }, handler () { throw new Error('no') }, onFailed: () => new Promise(() => {}) })
  const { app, engine, logs } = await onStub(t, { tasks: [never, job], onError: () => new Promise(() => {}) })
  app.get('/', async request => {
    request.backgroundTasks.addTask(() => { throw new Error('first') })
    request.backgroundTasks.addTask(() => { ran.push('second') })
  })
  await app.ready()
  let verdict: unknown
  void engine.deliver({ task: 'never' }).then(got => { verdict = got })
  await app.inject('/')
  await clock.pass(29_999)
  t.strictSame(ran, [])
  await clock.pass(1)
  t.strictSame(ran, ['second'])
  t.equal(verdict, undefined)
  await clock.pass(30_000)
  t.match(verdict, { kind: 'failed', error: { message: 'no' } })
  t.strictSame(logs.filter(({ msg }) => /of a background task failed$/.test(msg)).map(({ msg, err }) => [msg, err?.message]), [
    ['onError of a background task failed', 'onError did not finish within 30000 ms'],
    ['onError of a background task failed', 'onError did not finish within 30000 ms'],
    ['onFailed of a background task failed', 'onFailed did not finish within 30000 ms']
  ])
})

t.test('the lines of a job have the id of its request under the app\'s own label, wherever Fastify keeps the label', async t => {
  const lined = defineTask({ name: 'lined', handler (_, { log }) { log.info('job') } })
  // Fastify 5.0 does not have this class.
  const { LogController } = fastify as unknown as { LogController?: new (options: object) => never }
  const servers: Array<[label: string, server: FastifyServerOptions]> = [['reqId', {}], ['traceId', { requestIdLogLabel: 'traceId' }]]
  if (LogController !== undefined) servers.push(['spanId', { logController: new LogController({ requestIdLogLabel: 'spanId' }) } as FastifyServerOptions])
  for (const [label, server] of servers) {
    for (const isChild of [false, true]) {
      const engine = new StubEngine()
      const { logger, logs } = collectLogs()
      const app = Fastify({ ...server, logger })
      t.teardown(() => app.close())
      const register = async (app: FastifyInstance): Promise<void> => { await app.register(backgroundTasks, { tasks: [lined], engine }) }
      await (isChild ? app.register(register) : register(app))
      await app.ready()
      await engine.deliver({ task: 'lined', requestId: 'req-7' })
      t.match(logs.find(({ msg }) => msg === 'job'), { [label]: 'req-7' }, label)
    }
  }
})
