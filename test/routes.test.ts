/** The operator's routes: what they answer, whom they refuse, and that nothing of the app around them changes that. */
import { get as httpGet } from 'node:http'
import { setTimeout as sleep } from 'node:timers/promises'
import basicAuth from '@fastify/basic-auth'
import swagger from '@fastify/swagger'
import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
import t, { type Test } from 'tap'
import backgroundTasks, { defineTask, type FastifyBackgroundTasksOptions, type JobQuery, type JobRecord } from '../lib/index.js'
import taskRoutes, { taskRoutes as named, type TaskRoutesOptions } from '../lib/routes.js'
import { withoutHosts } from '../lib/routes/without-hosts.js'
import { recordTasks } from '../lib/testing.js'
import { start } from './support/app.js'
import { StubEngine } from './support/stub-engine.js'

t.setTimeout(60_000)

const UNKNOWN = '00000000-0000-4000-8000-000000000000'
const SECRET = 'swordfish'

interface Reply { status: number, headers: Headers, body: any }
interface Operated { app: FastifyInstance, call: (path: string, method?: string, init?: RequestInit) => Promise<Reply> }

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(5)
}

/** An app with the routes at /tasks, which is asked over a socket. */
async function operate (t: Test, options: FastifyBackgroundTasksOptions, routes: TaskRoutesOptions = { public: true }, server: FastifyServerOptions = {}, before = async (_app: FastifyInstance): Promise<void> => {}): Promise<Operated> {
  const { app, address } = await start(t, options, server)
  await before(app)
  await app.register(taskRoutes, { prefix: '/tasks', ...routes })
  return { app, call: async (path, method = 'GET', init = {}) => await ask(`${await address()}/tasks${path}`, method, init) }
}

async function ask (url: string, method = 'GET', init: RequestInit = {}): Promise<Reply> {
  const reply = await fetch(url, { ...init, method })
  const text = await reply.text()
  const isJson = reply.headers.get('content-type')?.startsWith('application/json') === true
  return { status: reply.status, headers: reply.headers, body: isJson && text !== '' ? JSON.parse(text) : text }
}

/** The status of a path that is sent as it stands. */
async function statusOf (url: string, path: string): Promise<number> {
  return await new Promise((resolve, reject) => {
    httpGet(url, { path }, reply => { reply.resume(); resolve(reply.statusCode ?? 0) }).on('error', reject)
  })
}

/** Tasks that succeed, fail, wait or hang, as their payload says. */
function kinds (): { kinds: ReturnType<typeof define>, release: () => void } {
  let release = (): void => {}
  const gate = new Promise<void>(resolve => { release = resolve })
  const define = () => defineTask({
    name: 'kinds',
    retry: { attempts: 1 },
    async handler ({ kind }: { kind: string, secret?: string }) {
      if (kind === 'hang') await gate
      if (kind === 'fail') throw Object.assign(new TypeError('no'), { code: 'E_NO', config: SECRET })
      return { kind }
    }
  })
  return { kinds: define(), release }
}

/** An engine that can be operated. */
class OperatedEngine extends StubEngine {
  records: JobRecord[] = []
  queries: JobQuery[] = []
  fails: unknown
  isConnected = true

  constructor () {
    super()
    Object.assign(this.supports, { count: true, find: true, retry: true, cancel: true })
  }

  #orFail<T> (value: T): T {
    if (this.fails !== undefined) throw this.fails
    return value
  }

  override async get (_task: string, id: string, options?: { readonly payload: boolean }): Promise<JobRecord | undefined> {
    const record = this.#orFail(this.records).find(record => record.id === id)
    if (record === undefined || options?.payload === true) return record
    const { payload, ...rest } = record
    return rest
  }

  async count (): Promise<{ pending: number, failed: number }> {
    return this.#orFail({ pending: this.records.length, failed: 0 })
  }

  async find (_task: string, query: JobQuery): Promise<JobRecord[]> {
    this.queries.push(query)
    const time = ({ enqueuedAt }: JobRecord): number => Date.parse(enqueuedAt)
    const isBehind = (record: JobRecord): boolean => query.after === undefined || time(record) < query.after.enqueuedAt || (time(record) === query.after.enqueuedAt && record.id < query.after.id)
    return this.#orFail(this.records).filter(record => record.state === query.state && isBehind(record))
      .toSorted((a, b) => time(b) - time(a) || (a.id < b.id ? 1 : -1)).slice(0, query.limit)
  }

  async retry (): Promise<boolean> { return this.#orFail(false) }
  async cancel (): Promise<boolean> { return this.#orFail(false) }
}

t.test('register refuses without a guard of the routes themselves, and says what to pass', async t => {
  const guard = async (): Promise<void> => {}
  const accepts = async (options: object, before = (_app: FastifyInstance): void => {}): Promise<void> => {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(backgroundTasks)
    before(app)
    await app.register(taskRoutes, { prefix: '/tasks', ...options })
  }
  for (const options of [
    {}, { public: false }, { public: undefined }, { onRequest: undefined }, { onRequest: [] }, { preHandler: [] }, { onRequest: [], preHandler: undefined, public: false }, { payloads: true }
  ]) {
    await t.rejects(accepts(options), { code: 'FST_BGT_INVALID_OPTION', message: /fastify-background-tasks: taskRoutes needs a guard.*"onRequest" or "preHandler".*public: true/ }, JSON.stringify(options))
  }
  await t.rejects(accepts({}, app => { app.addHook('onRequest', guard) }), { message: /A guard of the app does not count/ }, 'a guard of a parent')
  for (const [options, message] of [
    [{ onRequest: 'basic' }, /"onRequest" of taskRoutes accepts a function, or an array of functions; received 'basic'/], [{ onRequest: [undefined] }, /"onRequest"/],
    [{ onRequest: null }, /"onRequest"/], [{ preHandler: [guard, 1] }, /"preHandler"/], [{ preHandler: function * () {} }, /"preHandler"/], [{ onRequest: new Array(1) }, /"onRequest"/],
    [{ public: 1 }, /"public" of taskRoutes accepts a boolean/], [{ public: true, payloads: 'yes' }, /"payloads"/], [{ public: true, preValidation: guard }, /taskRoutes has no option "preValidation"; it accepts onRequest, preHandler, public, payloads/]
  ] as const) await t.rejects(accepts(options), { code: 'FST_BGT_INVALID_OPTION', message })
  for (const options of [{ onRequest: guard }, { preHandler: guard }, { onRequest: [guard] }, { preHandler: [guard, guard], onRequest: [] }, { public: true }, { public: true, onRequest: guard, logLevel: 'warn', logger: true }]) {
    await t.resolves(accepts(options), JSON.stringify(Object.keys(options)))
  }
  t.equal(named, taskRoutes)
})

t.test('register refuses an app without background tasks, one of another copy, and a definition named health', async t => {
  const app = Fastify()
  await t.rejects(Promise.resolve(app.register(taskRoutes, { public: true })), { code: 'FST_BGT_INVALID_OPTION', message: /taskRoutes was registered in an app that has no background tasks: register fastify-background-tasks before it/ })
  const other = Fastify()
  other.decorate('backgroundTasks', {} as never)
  await t.rejects(Promise.resolve(other.register(taskRoutes, { public: true })), { code: 'FST_BGT_INVALID_OPTION', message: /another copy.*install it once/ })
  const third = Fastify()
  await third.register(backgroundTasks, { tasks: [defineTask({ name: 'health', handler () {} })] })
  await t.rejects(Promise.resolve(third.register(taskRoutes, { public: true })), { code: 'FST_BGT_INVALID_OPTION', message: /definition "health".*rename/ })
})

const PATHS = [
  ['GET', ''], ['GET', '/'], ['GET', '/health'], ['GET', '/kinds'], ['GET', '/kinds?state=lost'], ['GET', '/none'], ['GET', `/kinds/${UNKNOWN}`], ['HEAD', '/'], ['HEAD', '/health'], ['HEAD', '/kinds'],
  ['HEAD', `/kinds/${UNKNOWN}`], ['POST', `/kinds/${UNKNOWN}/retry`], ['DELETE', `/kinds/${UNKNOWN}`], ['GET', '/kinds/a%2Fb'], ['GET', '/__proto__']
] as const

t.test('the guard answers for every route, before anything is looked at, whichever hook it is', async t => {
  const refuse = async (): Promise<void> => { throw Object.assign(new Error('who are you?'), { statusCode: 401, config: SECRET, toJSON: () => ({ config: SECRET }) }) }
  for (const hook of ['onRequest', 'preHandler'] as const) {
    for (const guard of [refuse, [refuse], [async () => {}, refuse]]) {
      const { call } = await operate(t, { tasks: [kinds().kinds] }, { [hook]: guard })
      for (const [method, path] of PATHS) {
        const { status, body } = await call(path, method)
        t.equal(status, 401, `${hook}: ${method} ${path}`)
        if (method !== 'HEAD') t.strictSame(body, { statusCode: 401, error: 'Unauthorized', message: 'who are you?' })
      }
    }
  }
  const { call } = await operate(t, { tasks: [kinds().kinds] }, { onRequest: async () => { throw Object.assign(new Error('hidden'), { statusCode: 404, secret: SECRET }) } })
  const hidden = await call(`/kinds/${UNKNOWN}`)
  t.match([hidden.status, hidden.body], [404, { statusCode: 404, error: 'Not Found', message: 'hidden' }], 'a status of the schema')
  t.notMatch(JSON.stringify(hidden.body), SECRET)
})

t.test('@fastify/basic-auth is a guard', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(backgroundTasks, { tasks: [kinds().kinds] })
  await app.register(basicAuth, { authenticate: true, validate: async (_name, password) => { if (password !== SECRET) throw new Error('wrong') } })
  await app.register(taskRoutes, { prefix: '/tasks', onRequest: app.basicAuth })
  const address = await app.listen({ port: 0, host: '127.0.0.1' })
  const refused = await ask(`${address}/tasks`)
  t.match([refused.status, refused.headers.get('www-authenticate')], [401, /^Basic/])
  t.equal((await ask(`${address}/tasks`, 'GET', { headers: { authorization: `Basic ${btoa(`ada:${SECRET}`)}` } })).status, 200)
})

t.test('they count, list, read, retry and cancel the tasks of this process, and tell of its health', async t => {
  const { kinds: definition, release } = kinds()
  const { app, call } = await operate(t, { tasks: [definition, defineTask({ name: '__proto__', handler () {} })] })
  const add = async (kind: string, delay = 0): Promise<string> => (await app.backgroundTasks.enqueue(definition, { kind, secret: SECRET }, { delay })).id
  const [done, failed, older, hanging, delayed] = [await add('ok'), await add('fail'), await add('fail'), await add('hang'), await add('later', 60_000)]
  await until(async () => (await app.backgroundTasks.count(definition)).failed === 2 && (await app.backgroundTasks.get(definition, done))?.state === 'succeeded')

  const counts = await call('/')
  t.match([counts.status, counts.body], [200, [
    { name: 'kinds', pending: 0, delayed: 1, running: 1, retrying: 0, failed: 2 }, { name: '__proto__', pending: 0, delayed: 0, running: 0, retrying: 0, failed: 0 }
  ]])
  t.match([counts.headers.get('content-type'), counts.headers.get('cache-control')], ['application/json; charset=utf-8', 'no-store'])
  const health = await call('/health')
  t.match([health.status, health.body], [200, { engine: null, connected: true, consuming: ['kinds', '__proto__'] }])

  const page = await call('/kinds?state=failed')
  t.match([page.status, page.body], [200, { records: [{ state: 'failed', attempt: 1, error: { name: 'TypeError', message: 'no', code: 'E_NO' } }, {}] }])
  t.strictSame(page.body.records.map(({ id }: JobRecord) => id).toSorted(), [failed, older].toSorted())
  const first = await call('/kinds?state=failed&limit=1')
  const second = await call(`/kinds?state=failed&limit=1&after=${first.body.next}`)
  t.strictSame([...first.body.records, ...second.body.records], page.body.records, 'page by page')
  t.notOk('next' in second.body)
  t.strictSame((await call('/__proto__?state=failed')).body, { records: [] })

  const read = await call(`/kinds/${done}`)
  t.match([read.status, read.body], [200, { id: done, name: 'kinds', state: 'succeeded', attempt: 1, result: { kind: 'ok' }, enqueuedAt: String, startedAt: String, finishedAt: String }])
  t.notMatch(JSON.stringify([page.body, read.body, (await call(`/kinds/${failed}`)).body]), SECRET, 'no payload')
  const missing = await call(`/kinds/${UNKNOWN}`)
  t.match([missing.status, missing.body], [404, { statusCode: 404, error: 'Not Found', message: /no such task/ }])
  t.equal((await call(`/__proto__/${done}`)).status, 404, 'a task of another definition')

  for (const [method, path, status, body] of [
    ['POST', `/kinds/${done}/retry`, 409, { statusCode: 409, error: 'Conflict', message: 'The task has not failed for good. Its state is "succeeded"' }],
    ['POST', `/kinds/${hanging}/retry`, 409, { message: /"running"/ }],
    ['POST', `/kinds/${UNKNOWN}/retry`, 404, { message: /no such task/ }],
    ['DELETE', `/kinds/${done}`, 409, { message: 'The task has ended. Its state is "succeeded"' }],
    ['DELETE', `/kinds/${UNKNOWN}`, 404, { message: /no such task/ }],
    ['DELETE', `/kinds/${delayed}`, 202, { id: delayed, name: 'kinds' }],
    ['DELETE', `/kinds/${delayed}`, 409, { message: /"skipped"/ }],
    ['DELETE', `/kinds/${hanging}`, 202, { id: hanging, name: 'kinds' }],
    ['POST', `/kinds/${failed}/retry`, 202, { id: failed, name: 'kinds' }]
  ] as const) {
    const reply = await call(path, method)
    t.match([reply.status, reply.body], [status, body], `${method} ${path}`)
  }
  release()
  t.equal((await call(`/kinds/${hanging}`)).body.state, 'skipped')
  await until(async () => (await call('/kinds?state=failed')).body.records.length === 2)
  for (const [method, path] of [['PUT', '/'], ['POST', '/'], ['DELETE', '/kinds'], ['POST', `/kinds/${done}`], ['GET', `/kinds/${done}/retry`], ['GET', '/a/b/c/d']]) t.equal((await call(path as string, method)).status, 404, `${method} ${path}`)
})

t.test('HEAD answers where GET does, unless the app has turned it off', async t => {
  for (const exposeHeadRoutes of [true, false]) {
    const { call } = await operate(t, { tasks: [kinds().kinds] }, { public: true }, { exposeHeadRoutes })
    for (const path of ['/', '/health', '/kinds?state=failed']) t.match([(await call(path, 'HEAD')).status, (await call(path, 'HEAD')).body], [exposeHeadRoutes ? 200 : 404, ''])
  }
})

t.test('names, ids and parameters of any kind are a 4xx, and are not in the reply', async t => {
  const sound = { 'state=failed': 200, 'state=failed&limit=1': 200, 'state=failed&limit=500': 200, 'state=failed&other=1': 200 }
  const wrong = [
    '', 'state=', 'state=lost', 'state=__proto__', 'state=constructor', 'state=failed&state=failed', 'state[]=failed', 'State=failed', 'state=FAILED', ...['0', '501', '-1', '1.5', '1e2', '', ' 5', '0x10', 'NaN', 'Infinity', '99999999999999999999', 'true', 'x'.repeat(5_000)].map(limit => `state=failed&limit=${encodeURIComponent(limit)}`),
    'state=failed&limit=1&limit=2', ...['', 'x', '%00', 'MA', '__proto__', 'x'.repeat(5_000), btoa('99999999999999999 a'), btoa('9999999999999999 a'), btoa('1 ')].map(after => `state=failed&after=${after}`), 'state=failed&after=a&after=b'
  ]
  const names = ['none', '__proto__', 'constructor', 'toString', 'hasOwnProperty', 'kinds%2Fx', 'kinds%00', 'x'.repeat(5_000), 'Kinds', '%F0%9F%92%A9', '%3Cscript%3E', '%00', 'kinds%20', '%7B%7D']
  const ids = [...names, 'retry', UNKNOWN, UNKNOWN.toUpperCase(), '*', 'a:b', '\'%3B%20drop%20table%20job%3B%20--', `${UNKNOWN}%00`, `%0a${UNKNOWN}`]
  const cases: Array<[FastifyBackgroundTasksOptions, FastifyServerOptions]> = [
    [{}, {}],
    [{}, { ajv: { customOptions: { coerceTypes: 'array', useDefaults: true, removeAdditional: 'all' } } }],
    [{ engine: new OperatedEngine() }, { routerOptions: { maxParamLength: 10_000 }, ajv: { customOptions: { coerceTypes: false } } }]
  ]
  for (const [options, server] of cases) {
    const { call, app } = await operate(t, { tasks: [kinds().kinds], ...options }, { public: true }, server)
    for (const [query, status] of Object.entries(sound)) t.equal((await call(`/kinds?${query}`)).status, status, query)
    const replies: Array<[string, Reply]> = []
    for (const query of wrong) replies.push([query.slice(0, 60), await call(`/kinds?${query}`)])
    t.strictSame(replies.filter(([, { status }]) => status !== 400).map(([query]) => query), [])
    for (const name of names) for (const [method, rest] of [['GET', ''], ['GET', '?state=failed'], ['GET', '/x'], ['POST', '/x/retry'], ['DELETE', '/x']] as const) replies.push([name.slice(0, 60), await call(`/${name}${rest}`, method)])
    for (const id of ids) for (const [method, rest] of [['GET', ''], ['POST', '/retry'], ['DELETE', '']] as const) replies.push([id.slice(0, 60), await call(`/kinds/${id}${rest}`, method)])
    t.strictSame(replies.filter(([, { status }]) => status < 400 || status >= 500).map(([what, { status }]) => [what, status]), [])
    const told = replies.filter(([, { body }]) => typeof body.message === 'string' && !/^Route /.test(body.message) && body.code !== 'FST_ERR_MAX_PARAM_LENGTH').map(([, { body }]) => JSON.stringify(body).slice(0, 200))
    t.ok(told.length > 100)
    t.strictSame(told.filter(text => /x{5}|script|drop|\\u0000|lost/.test(text)), [], 'what a client has sent is not repeated')
    const { port } = app.addresses()[0] as { port: number }
    for (const path of ['/tasks/%zz', '/tasks/kinds/%zz', '/tasks/../kinds', '/tasks/%2e%2e', '/tasks/kinds/%2e%2e', '/tasks/./x', '/tasks/kinds/%c0%af', '/tasks//', '/tasks/kinds//retry', '/tasks/kinds/']) {
      const status = await statusOf(`http://127.0.0.1:${port}`, path)
      t.ok(status >= 400 && status < 500, `${path}: ${status}`)
    }
    await app.close()
  }
  const { call } = await operate(t, { tasks: [kinds().kinds] })
  for (const method of ['POST', 'DELETE']) {
    const path = method === 'POST' ? `/kinds/${UNKNOWN}/retry` : `/kinds/${UNKNOWN}`
    t.equal((await call(path, method, { body: '{"__proto__":1}', headers: { 'content-type': 'application/json' } })).status, 400)
    t.equal((await call(path, method, { body: '{}', headers: { 'content-type': 'application/json' } })).status, 404, 'a body is passed over')
  }
})

t.test('payloads: true shows payloads in both routes of records, and a record without one has none', async t => {
  const { kinds: definition, release } = kinds()
  const { app, call } = await operate(t, { tasks: [definition] }, { public: true, payloads: true })
  const [{ id: failed }, { id: done }, { id: delayed }] = await Promise.all([['fail', 0], ['ok', 0], ['later', 60_000]].map(async ([kind, delay]) =>
    await app.backgroundTasks.enqueue(definition, { kind: String(kind), secret: SECRET }, { delay: Number(delay) }))) as unknown as [{ id: string }, { id: string }, { id: string }]
  await until(async () => (await call('/kinds?state=failed')).body.records.length === 1 && (await call('/kinds?state=succeeded')).body.records.length === 1)
  for (const id of [failed, delayed]) t.strictSame((await call(`/kinds/${id}`)).body.payload.secret, SECRET)
  t.strictSame((await call('/kinds?state=failed')).body.records[0].payload, { kind: 'fail', secret: SECRET })
  t.notOk('payload' in (await call(`/kinds/${done}`)).body)
  t.equal((await call(`/kinds/${UNKNOWN}`)).status, 404)
  release()

  const engine = new OperatedEngine()
  const enqueuedAt = new Date(1_000_000).toISOString()
  const job = (n: number, time = enqueuedAt): JobRecord => ({ id: `00000000-0000-4000-8000-${String(n).padStart(12, '0')}`, name: 'kinds', state: 'failed', attempt: 1, enqueuedAt: time, payload: { n } })
  engine.records = [job(0, new Date(2_000_000).toISOString()), ...Array.from({ length: 250 }, (_, n) => job(n + 1)), job(999, new Date(1).toISOString())]
  const stored = await operate(t, { tasks: [definition], engine }, { public: true, payloads: true })
  t.match(await stored.call(`/kinds/${job(7).id}`), { status: 200, body: { id: job(7).id, payload: { n: 7 } } })
  const { get } = engine
  engine.get = async (task, id) => await get.call(engine, task, id)
  t.notOk('payload' in (await stored.call(`/kinds/${job(7).id}`)).body, 'an engine that does not know that payloads can be asked for')
  engine.get = async () => { throw new Error(SECRET) }
  t.match((await stored.call(`/kinds/${job(7).id}`)).status, 503)

  const liar = new OperatedEngine()
  liar.records = [{ ...job(1), secret: SECRET, error: { name: 'Error', message: 'no', config: SECRET }, payload: SECRET } as never]
  liar.get = async () => liar.records[0]
  const hiding = await operate(t, { tasks: [definition], engine: liar })
  for (const path of ['/kinds?state=failed', `/kinds/${job(1).id}`]) {
    const { status, body } = await hiding.call(path)
    t.equal(status, 200)
    t.notMatch(JSON.stringify(body), SECRET, 'nothing is shown that no record should have')
  }
})

t.test('what the placement cannot do is 501, and an id that cannot be looked up is 404', async t => {
  const engine = new StubEngine()
  Object.assign(engine.supports, { get: false })
  const { call } = await operate(t, { tasks: [kinds().kinds], engine })
  for (const [method, path] of [['GET', '/'], ['GET', '/kinds?state=failed'], ['GET', `/kinds/${UNKNOWN}`], ['POST', `/kinds/${UNKNOWN}/retry`], ['DELETE', `/kinds/${UNKNOWN}`]] as const) {
    const reply = await call(path, method)
    t.match([reply.status, reply.body], [501, { statusCode: 501, code: 'FST_BGT_UNSUPPORTED', error: 'Not Implemented', message: /^stub does not support "/ }], `${method} ${path}`)
  }
  t.equal((await call('/health')).status, 200)
  t.equal((await call('/none?state=failed')).status, 404, 'the name is looked at first')
  t.equal((await call('/kinds?state=lost')).status, 400, 'and the parameters')

  const rabbit = new OperatedEngine()
  Object.assign(rabbit.supports, { get: false, find: false, cancel: false })
  const like = await operate(t, { tasks: [kinds().kinds], engine: rabbit })
  t.strictSame((await like.call('/')).body, [{ name: 'kinds', pending: 0, failed: 0 }])
  t.equal((await like.call(`/kinds/${UNKNOWN}/retry`, 'POST')).status, 404, 'nobody can tell whether it has failed')
  rabbit.retry = async () => true
  t.equal((await like.call(`/kinds/${UNKNOWN}/retry`, 'POST')).status, 202)
  t.equal((await like.call(`/kinds/${UNKNOWN}`, 'DELETE')).status, 501)
})

t.test('an engine that is away is a 503 with Retry-After, and no reply names its host', async t => {
  const engine = new OperatedEngine()
  const { call, app } = await operate(t, { tasks: [kinds().kinds], engine, enqueueTimeout: 100 })
  const all = [['GET', '/'], ['GET', '/kinds?state=failed'], ['GET', `/kinds/${UNKNOWN}`], ['POST', `/kinds/${UNKNOWN}/retry`], ['DELETE', `/kinds/${UNKNOWN}`]] as const
  await app.ready()
  engine.report?.(new Error('connect ECONNREFUSED redis.internal:6379 (10.1.2.3)'))
  engine.isConnected = false
  for (const fails of [new Error(`connect ECONNREFUSED redis.internal:6379 ${SECRET}`), undefined, 'redis.internal', null, Object.assign(new Error('redis.internal'), { statusCode: 302, headers: { location: 'redis.internal' } })]) {
    engine.fails = fails ?? new Promise(() => {})
    if (fails === undefined) Object.assign(engine, { count: async () => await new Promise(() => {}), retry: async () => await new Promise(() => {}) })
    for (const [method, path] of fails === undefined ? [all[0], all[3]] : all) {
      const reply = await call(path, method)
      t.match([reply.status, reply.body], [503, { statusCode: 503, code: 'FST_BGT_ENGINE_UNAVAILABLE', error: 'Service Unavailable' }], `${method} ${path}`)
      t.equal(reply.headers.get('retry-after'), '1')
      t.notMatch(JSON.stringify([reply.body, ...reply.headers]), /internal|6379|10\.1|swordfish/)
    }
  }
  engine.retry = async () => false
  t.equal((await call(`/kinds/${UNKNOWN}/retry`, 'POST')).status, 503, 'it goes away before the record is read')
  const health = await call('/health')
  t.strictSame([health.status, health.body], [503, { engine: 'stub', connected: false, consuming: ['kinds'], error: 'connect ECONNREFUSED …' }])
  t.equal(health.headers.get('retry-after'), '1')
  engine.isConnected = true
  t.strictSame((await call('/health')).body, { engine: 'stub', connected: true, consuming: ['kinds'] })
})

t.test('a fault that nobody thought of is a 500 without its words, which the log has', async t => {
  const { app, logs } = await start(t, { tasks: [kinds().kinds] })
  await app.register(taskRoutes, { public: true })
  app.backgroundTasks.count = async () => { throw new Error(`at redis.internal with ${SECRET}`) }
  const reply = await app.inject('/')
  t.match([reply.statusCode, reply.json()], [500, { statusCode: 500, error: 'Internal Server Error', message: 'Something went wrong' }])
  t.match(logs.filter(({ level }) => level === 50), [{ msg: 'a route of background tasks has failed', err: { message: new RegExp(SECRET) } }])
})

t.test('a retry that the app has no room for is a 503', async t => {
  const { kinds: definition, release } = kinds()
  const { app, call } = await operate(t, { tasks: [definition], maxPending: 1 })
  const { id } = await app.backgroundTasks.enqueue(definition, { kind: 'fail' })
  await app.backgroundTasks.idle()
  await app.backgroundTasks.enqueue(definition, { kind: 'hang' })
  const reply = await call(`/kinds/${id}/retry`, 'POST')
  t.match([reply.status, reply.headers.get('retry-after'), reply.body], [503, '1', { code: 'FST_BGT_OVERLOADED' }])
  release()
})

t.test('compilers, serializers, error handlers and parsers of the app change nothing', async t => {
  const noSchemas = (): never => { throw new Error('these compilers know zod') }
  const apps: Record<string, [FastifyServerOptions, (app: FastifyInstance) => void]> = {
    compilers: [{}, app => { app.setValidatorCompiler(noSchemas); app.setSerializerCompiler(noSchemas) }],
    'a schema controller': [{ schemaController: { compilersFactory: { buildValidator: () => noSchemas, buildSerializer: () => noSchemas } } }, () => {}],
    'an error handler and a reply serializer': [{}, app => {
      app.setErrorHandler(async (_error, _request, reply) => await reply.code(500).send({ oops: true }))
      app.setReplySerializer(() => '"of the app"')
    }],
    'a query parser': [{ routerOptions: { querystringParser: text => text === '' ? null as never : Object.fromEntries(Array.from(new URLSearchParams(text), ([name, value]) => [name, name === 'limit' ? Number(value) : value])) } }, () => {}],
    'a not-found handler and hooks': [{ ignoreTrailingSlash: true }, app => {
      app.setNotFoundHandler(async (_request, reply) => await reply.code(404).send({ of: 'the app' }))
      app.addHook('preSerialization', async (_request, _reply, payload) => { if (typeof payload === 'object') Object.assign(payload as object, { touched: true }) })
    }]
  }
  for (const [name, [server, before]] of Object.entries(apps)) {
    const { app, call } = await operate(t, { tasks: [kinds().kinds] }, { public: true }, server, async app => { before(app) })
    app.get('/of-the-app', async () => await Promise.reject(new Error('x')))
    t.match([(await call('/')).status, (await call('/')).body[0]], [200, { name: 'kinds', pending: 0 }], name)
    t.match((await call('/kinds?state=failed&limit=5')).body, { records: [] })
    for (const [path, status] of [['/kinds?state=failed&limit=501', 400], ['/kinds?state=failed&after=x', 400], ['/kinds', 400], ['/none', 404], [`/kinds/${UNKNOWN}`, 404]] as const) {
      const reply = await call(path)
      t.match([reply.status, reply.body], [status, { statusCode: status, message: String }], `${name}: ${path}`)
      if (name.includes('hooks')) t.equal(reply.body.touched, true)
    }
  }
})

t.test('they are mounted several times, in children, with prefixes or without, each for its own app', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  const define = (name: string) => defineTask({ name, handler () {} })
  await app.register(backgroundTasks, { tasks: [define('shared')] })
  await app.register(taskRoutes, { prefix: '/a', public: true })
  await app.register(async child => {
    await child.register(taskRoutes, { prefix: '/b', onRequest: async () => { throw Object.assign(new Error('no'), { statusCode: 403 }) } })
    await child.register(taskRoutes, { public: true })
  }, { prefix: '/child' })
  const other = Fastify()
  t.teardown(() => other.close())
  await other.register(async child => {
    await child.register(backgroundTasks, { tasks: [define('own')] })
    await child.register(taskRoutes, { prefix: '/ops', public: true })
  }, { prefix: '/:tenant' })
  const names = async (server: FastifyInstance, url: string): Promise<unknown> => {
    const reply = await server.inject(url)
    return reply.statusCode === 200 ? reply.json<Array<{ name: string }>>().map(({ name }) => name) : reply.statusCode
  }
  t.strictSame(await Promise.all(['/a', '/a/', '/child', '/child/', '/child/b', '/child/b/health', '/', '/shared'].map(async url => await names(app, url))), [['shared'], ['shared'], ['shared'], ['shared'], 403, 403, 404, 404])
  t.strictSame(await Promise.all(['/x/ops', '/ops'].map(async url => await names(other, url))), [['own'], 404])
  t.equal((await app.inject('/child/shared?state=failed')).statusCode, 200)
})

t.test('@fastify/swagger documents each route, with what it takes and answers', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(swagger, { openapi: { info: { title: 'Tasks', version: '1' } } })
  await app.register(backgroundTasks, { tasks: [kinds().kinds] })
  await app.register(taskRoutes, { prefix: '/tasks', public: true })
  await app.register(taskRoutes, { prefix: '/open', public: true, payloads: true })
  await app.ready()
  const { paths } = app.swagger() as unknown as { paths: Record<string, Record<string, { summary?: string, parameters?: Array<{ name: string }>, responses: Record<string, { description: string, content: { 'application/json': { schema: any } } }> }>> }
  const told = Object.entries(paths).filter(([path]) => path.startsWith('/tasks')).flatMap(([path, methods]) => Object.entries(methods).map(([method, { parameters = [], responses }]) =>
    `${method} ${path} (${parameters.map(({ name }) => name).toSorted().join()}): ${Object.keys(responses).join()}`))
  t.strictSame(told.toSorted(), [
    'delete /tasks/{name}/{id} (id,name): 202,404,409,501,503',
    'get /tasks/ (): 200,501,503',
    'get /tasks/health (): 200,503',
    'get /tasks/{name} (after,limit,name,state): 200,400,404,501,503',
    'get /tasks/{name}/{id} (id,name): 200,404,501,503',
    'post /tasks/{name}/{id}/retry (id,name): 202,404,409,501,503'
  ])
  for (const [path, methods] of Object.entries(paths)) {
    for (const { summary, responses } of Object.values(methods)) {
      t.ok(summary, path)
      t.notOk(Object.values(responses).some(({ description }) => description === '' || description === 'Default Response'), `${path} describes its answers`)
    }
  }
  const propertiesOf = (prefix: string): string[] => Object.keys(paths[`${prefix}/{name}/{id}`]?.['get']?.responses['200']?.content['application/json'].schema.properties)
  t.strictSame(propertiesOf('/tasks'), ['id', 'name', 'state', 'attempt', 'enqueuedAt', 'startedAt', 'finishedAt', 'error', 'result'])
  t.ok(propertiesOf('/open').includes('payload'))
})

t.test('while a test records they tell of what is recorded, and nothing connects', async t => {
  const { kinds: definition } = kinds()
  const engine = new OperatedEngine()
  engine.onStart = async () => { throw new Error('nobody is there') }
  const app = Fastify()
  t.teardown(() => app.close())
  const tasks = recordTasks(app)
  await app.register(backgroundTasks, { tasks: [definition], engine })
  await app.register(taskRoutes, { public: true })
  const { id } = await app.backgroundTasks.enqueue(definition, { kind: 'fail' })
  t.match((await app.inject('/')).json(), [{ name: 'kinds', pending: 1, failed: 0 }])
  t.match((await app.inject('/health')).json(), { engine: 'stub', connected: true })
  await t.rejects(tasks.run(), { message: 'no' })
  t.match((await app.inject('/kinds?state=failed')).json(), { records: [{ id, error: { message: 'no' } }] })
  t.equal((await app.inject({ method: 'POST', url: `/kinds/${id}/retry` })).statusCode, 202)
  t.equal((await app.inject({ method: 'DELETE', url: `/kinds/${id}` })).statusCode, 202)
  t.match((await app.inject(`/kinds/${id}`)).json(), { state: 'skipped' })
  t.strictSame(engine.calls, [])
})

t.test('a message of an engine loses its hosts and ports, and keeps its sense', async t => {
  const told: Record<string, string> = {
    'connect ECONNREFUSED 127.0.0.1:6379': 'connect ECONNREFUSED …',
    'connect ECONNREFUSED ::1:5432': 'connect ECONNREFUSED …',
    'getaddrinfo ENOTFOUND redis': 'getaddrinfo ENOTFOUND …',
    'getaddrinfo EAI_AGAIN db-primary': 'getaddrinfo EAI_AGAIN …',
    'connect ENOENT /var/run/redis.sock': 'connect ENOENT …',
    'read ECONNRESET': 'read ECONNRESET',
    'connect ETIMEDOUT 10.0.0.7': 'connect ETIMEDOUT …',
    'could not connect to server: Connection refused': 'could not connect to server: Connection refused',
    'could not connect to db-primary after 5 s': 'could not connect to … after 5 s',
    'no pg_hba.conf entry for host "10.1.2.3", user "app", database "shop", no encryption': 'no … entry for host … user "app", database "shop", no encryption',
    'amqp://guest:guest@rabbit:5672/%2f is away': '… is away',
    'MOVED 1234 10.0.0.1:6379': 'MOVED 1234 …',
    'Hostname/IP does not match certificate\'s altnames: Host: redis.internal. is not in the cert\'s altnames: DNS:example.com': '… does not match certificate\'s altnames: Host: … is not in the cert\'s altnames: …',
    'connection to server at "rabbit" (10.0.0.1), port 5672 failed': 'connection to server at … port … failed',
    'connect to localhost failed': 'connect to … failed',
    'it did not answer within enqueueTimeout, 2000 ms (the server did not answer within 5000 ms)': 'it did not answer within enqueueTimeout, 2000 ms (the server did not answer within 5000 ms)',
    'The server is Redis 5.0.14. This engine knows Redis from 6.2.0 on': 'The server is Redis 5.0.14. This engine knows Redis from 6.2.0 on',
    'password authentication failed for user "postgres"': 'password authentication failed for user "postgres"',
    '': ''
  }
  for (const [message, expected] of Object.entries(told)) t.equal(withoutHosts(message), expected)
})
