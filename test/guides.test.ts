/** What the guides in docs/ promise: their code is that of test/guides, which runs here. */
import { existsSync, readFileSync, rmSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { Type } from '@sinclair/typebox'
import { Queue } from 'bullmq'
import Fastify, { type FastifyInstance } from 'fastify'
import pg from 'pg'
import { PgBoss } from 'pg-boss'
import t, { type Test } from 'tap'
import { bullmq } from '../lib/engines/bullmq/index.js'
import { pgBoss } from '../lib/engines/pg-boss/index.js'
import { defineTask, type AnyTaskDefinition, type FastifyBackgroundTasksOptions, type TaskEngine } from '../lib/index.js'
import * as changing from './guides/changing-definitions.js'
import * as fromFastApi from './guides/from-fastapi.js'
import * as idempotent from './guides/idempotent-handlers.js'
import * as migrating from './guides/migrating.js'
import * as operating from './guides/operating.js'
import { deferred, start, type Started } from './support/app.js'
import { paragraphsOf } from './support/docs/paragraphs.js'
import { openPostgres } from './support/postgres.js'
import { openRedis } from './support/redis.js'
import { connectRaw, requestText } from './support/sockets.js'
import { StubEngine } from './support/stub-engine.js'

t.setTimeout(120_000)

/** Waits until it is so; a test that waits in vain is ended by its timeout. */
async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(10)
}

for (const guide of ['from-fastapi', 'idempotent-handlers', 'changing-definitions', 'migrating', 'operating']) {
  t.test(`each paragraph of code in docs/${guide}.md stands in its module, which is run below`, async t => {
    const { all, missing } = paragraphsOf(`${guide}.md`, [`guides/${guide}.ts`])
    t.ok(all.length > 0)
    t.strictSame(missing, [])
  })
}

t.test('each paragraph of code on a report in a thread stands in its modules, which test/recipes.test.ts runs', async t => {
  const { all, missing } = paragraphsOf('recipes.md', ['guides/reports.ts', 'guides/render-report.js'], 'A report in a thread')
  t.equal(all.length, 5)
  t.strictSame(missing, [])
})

t.test('from FastAPI', async t => {
  // Its code writes to log.txt, as the tutorial does.
  const home = process.cwd()
  process.chdir(t.testdir())
  t.teardown(() => { process.chdir(home) })
  const takeLog = (): string => {
    const log = readFileSync('log.txt', 'utf8')
    rmSync('log.txt')
    return log
  }
  const post = { method: 'POST', url: '/send-notification/ada@example.com' } as const

  await t.test('the tutorial\'s app', async t => {
    const app = await fromFastApi.notifications()
    t.teardown(() => app.close())
    t.strictSame((await app.inject(post)).json(), { message: 'Notification sent in the background' })
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    t.equal(takeLog(), 'notification for ada@example.com: some notification\n')
  })

  await t.test('a dependency adds to the same list, before the route', async t => {
    const { app } = await start(t)
    await fromFastApi.withDependency(app)
    t.strictSame((await app.inject({ ...post, query: { q: 'hello' } })).json(), { message: 'Message sent' })
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    t.equal(takeLog(), 'found query: hello\nmessage to ada@example.com\n')
    await app.inject(post)
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    t.equal(takeLog(), 'message to ada@example.com\n')
  })

  await t.test('tasks made by hand', async t => {
    const { app } = await start(t)
    await fromFastApi.signup(app)
    const reply = await app.inject({ method: 'POST', url: '/user/signup', payload: { email: 'ada@example.com', username: 'ada' } })
    t.strictSame(reply.json(), { status: 'Signup successful' })
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    t.equal(takeLog(), 'welcome, ada@example.com\nada has signed up\n')
  })

  await t.test('a task of an error handler runs, and that of the route that failed does not', async t => {
    const { app } = await start(t)
    await fromFastApi.payments(app)
    app.get('/other', async () => { throw new Error('no') })
    const reply = await app.inject({ method: 'POST', url: '/payments', payload: { email: 'ada@example.com' } })
    t.equal(reply.statusCode, 402)
    t.strictSame(reply.json(), { message: 'The payment failed' })
    t.equal((await app.inject('/other')).statusCode, 500)
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    t.equal(takeLog(), 'support: the bank is closed\n')
  })

  await t.test('an explicit `when` decides in an error handler, too', async t => {
    const { app } = await start(t)
    const ran: string[] = []
    app.addHook('onError', async request => { request.backgroundTasks.addTask(() => { ran.push('onError') }) })
    app.addHook('onSend', async request => { request.backgroundTasks.addTask(() => { ran.push('onSend') }) })
    app.setErrorHandler(async (_error, request, reply) => {
      request.backgroundTasks.with({ when: 'success' }).addTask(() => { ran.push('explicit') })
      return await reply.code(402).send()
    })
    app.get('/', async () => { throw new Error('no') })
    t.equal((await app.inject('/')).statusCode, 402)
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    t.strictSame(ran, ['onError'])
  })

  await t.test('a task with a name, on an engine', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    const engine = new StubEngine()
    await fromFastApi.reports(app, engine)
    const reply = await app.inject({ method: 'POST', url: '/reports', payload: { title: 'spring' } })
    const { id } = reply.json<{ id: string }>()
    t.equal(reply.statusCode, 202)
    t.match(engine.stored, [[{ id, task: 'make-report', payload: { title: 'spring' } }]])
    t.strictSame(await engine.deliver({ task: 'make-report', id, payload: { title: 'spring' } }), { kind: 'done', result: { file: 'spring.pdf' } })
    t.equal(fromFastApi.engine.name, 'bullmq')
  })
})

t.test('operating', async t => {
  const { sendEmail } = operating
  t.beforeEach(() => { operating.mail.isDown = false })
  const addFailed = async (app: FastifyInstance, to = 'ada@example.com'): Promise<string> => {
    const { id } = await app.backgroundTasks.enqueue(sendEmail, { to, subject: 'Hello' })
    await app.backgroundTasks.idle()
    return id
  }

  await t.test('tasks are counted, found, retried, cancelled and waited for', async t => {
    const { app } = await start(t, { tasks: [sendEmail] })
    operating.mail.isDown = true
    const ids = [await addFailed(app), await addFailed(app, 'nobody'), await addFailed(app)]
    t.strictSame(await operating.counted(app), { pending: 0, delayed: 0, running: 0, retrying: 0, failed: 3 })
    const { reasons, next } = await operating.found(app)
    t.equal(reasons.length, 3)
    t.match(reasons[0], /^[0-9a-f-]{36} has failed after 1 attempts at \S+Z: the mail server is down$/)
    t.equal(next, undefined)
    operating.mail.isDown = false
    t.equal(await operating.retried(app, ids[1] as string), true)
    await app.backgroundTasks.idle()
    t.equal(await operating.retriers(app).retryAll(sendEmail, 'the mail server is down'), 2, 'not the one that failed otherwise')
    t.match(await operating.waited(app, ids[0] as string), { state: 'succeeded' })
    t.equal(await operating.retried(app, ids[0] as string), false)
    const { id } = await app.backgroundTasks.enqueue(sendEmail, { to: 'ada@example.com', subject: 'Later' }, { delay: 60_000 })
    t.equal(await operating.isEmpty(app, sendEmail), false)
    t.equal(await operating.cancelled(app, id), true)
    t.equal(await operating.cancelled(app, id), false)
    await app.backgroundTasks.idle()
    t.equal(await operating.isEmpty(app, sendEmail), true)
  })

  await t.test('each curl of the page is answered, behind the login', async t => {
    process.env['OPERATOR_PASSWORD'] = 'secret'
    const app = await operating.withRoutes()
    t.teardown(() => app.close())
    const address = await app.listen({ port: 0, host: '127.0.0.1' })
    const id = await addFailed(app, 'nobody')
    const lines = readFileSync(new URL('../docs/operating.md', import.meta.url), 'utf8').match(/^curl .*$/gm) ?? []
    const statuses: number[] = []
    for (const line of lines) {
      const [, login = '', method = 'GET', path = ''] = /^curl -u (\S+) (?:-X (\w+) )?'?http:\/\/127\.0\.0\.1:3000([^' ]*)'?$/.exec(line) ?? []
      const call = async (login: string): Promise<number> =>
        (await fetch(address + path.replace('$ID', id), { method, headers: { authorization: `Basic ${btoa(login)}` } })).status
      t.equal(await call('ada:wrong'), 401, line)
      statuses.push(await call(login))
      await app.backgroundTasks.idle()
    }
    t.strictSame(statuses, [200, 200, 200, 200, 202, 409])
  })

  await t.test('a line of the log names each start, and a failed task goes to a queue of complaints', async t => {
    const { complaints, sendInvoice } = operating.deadLetters()
    const { app, logs } = await start(t, { tasks: [complaints, sendInvoice] })
    operating.logStarts(app)
    const { id } = await app.backgroundTasks.enqueue(sendInvoice, { order: 17 })
    await app.backgroundTasks.idle()
    t.match(logs.filter(({ msg }) => msg === 'background task starts'), [{ pid: process.pid, hostname: String, task: { id, name: 'send-invoice', attempt: 1 } }, { task: { name: 'complaints' } }])
    t.strictSame(operating.written, [`${id}: Error: order 17 has no address\n`])
  })

  await t.test('readiness follows the engine, and a worker without a port tells it by a file', async t => {
    const engine = Object.assign(new StubEngine(), { isConnected: true })
    const { app, address } = await start(t, { tasks: [sendEmail], engine })
    operating.readiness(app)
    const path = `${t.testdir()}/worker-is-well`
    operating.tellByFile(app, path)
    const status = async (): Promise<number> => (await fetch(`${await address()}/ready`)).status
    t.equal(await status(), 200)
    await until(() => existsSync(path))
    t.match(readFileSync(path, 'utf8'), /Z$/)
    engine.isConnected = false
    t.equal(await status(), 503)
  })

  await t.test('a process for one definition takes its jobs only, and what was refused is retried', async t => {
    const engine = new StubEngine()
    const worker = await operating.processForOne(engine)
    t.teardown(() => worker.close())
    t.match(engine.specs, [{ name: 'send-email', concurrency: 2 }])
    const retried: string[] = []
    Object.assign(engine.supports, { find: true, retry: true })
    Object.assign(engine, {
      find: async () => ['FST_BGT_INVALID_PAYLOAD', 'E_OTHER'].map(code => ({ id: code, name: 'send-email', state: 'failed', attempt: 1, enqueuedAt: new Date().toISOString(), error: { name: 'Error', message: '', code } })),
      retry: async (_task: string, id: string) => { retried.push(id); return true }
    })
    t.equal(await operating.retriers(worker).retryRefused(sendEmail), 1)
    t.strictSame(retried, ['FST_BGT_INVALID_PAYLOAD'])
  })
})

t.test('idempotent handlers', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { pool, schema } = postgres
  // Whatever the code of the guide connects finds the test's own schema, and can be told from others.
  const url = new URL(postgres.connectionString)
  url.searchParams.set('options', `-c search_path=${schema}`)
  url.searchParams.set('application_name', schema)
  const setUp = readFileSync(new URL('../docs/idempotent-handlers.md', import.meta.url), 'utf8').match(/```sql\n(.*?)```/s)?.[1]
  await pool.query(`create schema ${schema}; set search_path = ${schema}; ${setUp}; create table accounts (name text primary key, cents integer not null); reset search_path`)
  const read = async (query: string): Promise<unknown> => (await pool.query<{ value: unknown }>(`select ${query} as value`)).rows[0]?.value
  const cents = async (account: string): Promise<unknown> => await read(`(select cents from ${schema}.accounts where name = '${account}')`)

  const app = Fastify()
  t.teardown(() => app.close())
  const engine = new StubEngine()
  await idempotent.payments(app, url.href, engine)
  await app.ready()
  /** A job of an event: its deliveries have the id that was stored. */
  const jobOf = async (event: string): Promise<{ id: string, task: string, payload: unknown }> => {
    await pool.query(`insert into ${schema}.accounts values ('${event}', 100)`)
    const payload = { event, account: event, cents: 5 }
    t.equal((await app.inject({ method: 'POST', url: '/webhooks/payments', payload })).statusCode, 202)
    const [job] = engine.stored.at(-1) ?? []
    if (job === undefined) throw new Error('nothing was stored')
    return job
  }
  /** What stands in the way of the work until it is called. */
  const lock = async (account: string): Promise<() => Promise<void>> => {
    const client = await pool.connect()
    await client.query(`begin; select from ${schema}.accounts where name = '${account}' for update`)
    return async () => {
      await client.query('commit')
      client.release()
    }
  }
  const waiting = `(select count(*)::integer from pg_stat_activity where application_name = '${schema}' and wait_event_type = 'Lock')`

  await t.test('the same delivery twice has one effect', async t => {
    const job = await jobOf('twice')
    t.match(await engine.deliver(job), { kind: 'done' })
    t.match(await engine.deliver({ ...job, attempt: 2 }), { kind: 'done' })
    t.equal(await cents('twice'), 105)
  })

  await t.test('also at the same time', async t => {
    const job = await jobOf('at once')
    const release = await lock('at once')
    const deliveries = [engine.deliver(job), engine.deliver({ ...job, attempt: 2 })]
    await until(async () => await read(waiting) === 2)
    await release()
    t.match(await Promise.all(deliveries), [{ kind: 'done' }, { kind: 'done' }])
    t.equal(await cents('at once'), 105)
  })

  await t.test('a connection lost behind the insert has no effect, and the next start has', async t => {
    const job = await jobOf('lost')
    const release = await lock('lost')
    const delivery = engine.deliver(job)
    await until(async () => await read(waiting) === 1)
    await pool.query(`select pg_terminate_backend(pid) from pg_stat_activity where application_name = '${schema}' and wait_event_type = 'Lock'`)
    t.match(await delivery, { kind: 'retry' })
    await release()
    t.equal(await cents('lost'), 100)
    t.match(await engine.deliver({ ...job, attempt: 2 }), { kind: 'done' })
    t.equal(await cents('lost'), 105)
  })

  await t.test('work that throws leaves no row behind', async t => {
    const job = await jobOf('throws')
    const payload = { account: 'nobody', cents: 5 }
    t.match(await engine.deliver({ ...job, payload }), { kind: 'retry', error: { message: 'no such account' } })
    t.match(await engine.deliver({ ...job, attempt: 2 }), { kind: 'done' })
    t.equal(await cents('throws'), 105)
  })

  await t.test('a key is an id: repeated when its record has gone, it has no effect', async t => {
    const job = await jobOf('again')
    await engine.deliver(job)
    engine.stored.length = 0
    await app.inject({ method: 'POST', url: '/webhooks/payments', payload: { event: 'again', account: 'again', cents: 5 } })
    const [repeated] = engine.stored.flat()
    t.match(repeated, { id: job.id, keyed: true })
    t.match(await engine.deliver({ ...job, ...repeated }), { kind: 'done' })
    t.equal(await cents('again'), 105)
  })

  await t.test('noted first, it is at most once', async t => {
    const mails: string[] = []
    const ownPool = new pg.Pool({ connectionString: url.href })
    t.teardown(() => ownPool.end())
    const sendReminder = idempotent.sendReminderIn(ownPool, async to => {
      mails.push(to)
      throw new Error('the mail server is away')
    })
    const engine = new StubEngine()
    await (await start(t, { tasks: [sendReminder], engine })).app.ready()
    const job = { task: 'send-reminder', id: '00000000-0000-4000-8000-000000000001', payload: { to: 'ada@example.com' } }
    t.match(await engine.deliver(job), { kind: 'retry' })
    t.match(await engine.deliver({ ...job, attempt: 2 }), { kind: 'done' })
    t.strictSame(mails, ['ada@example.com'])
  })
})

t.test('an API that takes idempotency keys charges once, though its first answer never came', async t => {
  const charges = new Map<string, unknown>()
  const api = Fastify()
  t.teardown(() => api.close())
  api.post('/charges', async (request, reply) => {
    const key = String(request.headers['idempotency-key'])
    if (charges.has(key)) return { repeated: true }
    charges.set(key, request.body)
    reply.hijack()
    reply.raw.destroy()
  })
  const chargeCard = idempotent.chargeCardAt(await api.listen({ host: '127.0.0.1', port: 0 }))
  const engine = new StubEngine()
  await (await start(t, { tasks: [chargeCard], engine })).app.ready()
  const job = { task: 'charge-card', id: 'the task', payload: { customer: 'ada', cents: 500 } }
  t.match(await engine.deliver(job), { kind: 'retry' })
  t.match(await engine.deliver({ ...job, attempt: 2 }), { kind: 'done' })
  t.strictSame([...charges], [['the task', { customer: 'ada', cents: 500 }]])
  t.equal(idempotent.engine.name, 'pg-boss')
})

t.test('changing a definition whose jobs are stored', async t => {
  t.beforeEach(() => { changing.outbox.length = 0 })
  const old = { task: 'send-email', payload: { to: 'ada@example.com', subject: 'Hello' } }
  /** A worker that has this definition. */
  const worker = async (t: Test, definition: AnyTaskDefinition, options: FastifyBackgroundTasksOptions = {}): Promise<Started & { engine: StubEngine }> => {
    const engine = new StubEngine()
    const started = await start(t, { tasks: [definition], engine, ...options })
    await started.app.ready()
    return { ...started, engine }
  }

  await t.test('one more field, which is optional', async t => {
    const { engine } = await worker(t, changing.withAnotherField())
    t.match(await engine.deliver(old), { kind: 'done' })
    t.match(await engine.deliver({ ...old, payload: { ...old.payload, locale: 'fr' } }), { kind: 'done' })
    t.strictSame(changing.outbox, ['en', 'fr'].map(locale => ({ to: ['ada@example.com'], subject: 'Hello', locale })))
  })

  await t.test('one more field, with a default; a required one is refused', async t => {
    const seen: unknown[] = []
    const define = (locale: object): AnyTaskDefinition => defineTask({
      name: 'send-email',
      payload: { type: 'object', required: ['to', 'locale'], properties: { to: { type: 'string' }, locale } },
      handler ({ locale }: { to: string, locale: string }) { seen.push(locale) }
    })
    t.match(await (await worker(t, define({ type: 'string', default: 'en' }))).engine.deliver(structuredClone(old)), { kind: 'done' })
    t.strictSame(seen, ['en'])
    t.match(await (await worker(t, define({ type: 'string' }))).engine.deliver(old), { kind: 'failed' })
  })

  await t.test('an old worker ignores a new field, or refuses it with additionalProperties: false', async t => {
    const job = { ...old, payload: { ...old.payload, locale: 'fr' } }
    t.match(await (await worker(t, changing.before())).engine.deliver(job), { kind: 'done' })
    const strict = defineTask({ name: 'send-email', payload: Type.Object({ to: Type.String(), subject: Type.String() }, { additionalProperties: false }), handler () {} })
    t.match(await (await worker(t, strict)).engine.deliver(job), { kind: 'failed', error: { code: 'FST_BGT_INVALID_PAYLOAD', message: /locale/ } })
  })

  await t.test('versions', async t => {
    const { engine } = await worker(t, changing.withVersions())
    t.match(await engine.deliver(old), { kind: 'done' })
    t.match(await engine.deliver({ ...old, payload: { version: 2, recipients: ['ada@example.com'], subject: 'Hello' } }), { kind: 'done' })
    t.strictSame(changing.outbox, Array(2).fill({ to: ['ada@example.com'], subject: 'Hello' }))
    t.match(await engine.deliver({ ...old, payload: { version: 2, ...old.payload } }), { kind: 'failed' }, 'a broken one of version 2 is none of version 1')
  })

  await t.test('a new name beside the old one; a key is one of its name', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    const engine = new StubEngine()
    const { sendEmail, sendEmail2 } = await changing.withAnotherName(app, engine)
    await app.ready()
    t.match(await engine.deliver(old), { kind: 'done' })
    t.match(await engine.deliver({ task: 'send-email-2', payload: { recipients: ['ada@example.com'], subject: 'Hello' } }), { kind: 'done' })
    t.strictSame(changing.outbox, Array(2).fill({ to: ['ada@example.com'], subject: 'Hello' }))
    const { id } = await app.backgroundTasks.enqueue(sendEmail, old.payload, { key: 'order 17' })
    const other = await app.backgroundTasks.enqueue(sendEmail2, { recipients: [], subject: '' }, { key: 'order 17' })
    t.not(other.id, id)
    t.notOk(other.duplicate)
  })

  await t.test('what the new schema refuses has failed at once, with a line, onError, and no onFailed', async t => {
    const told: unknown[] = []
    const sendEmail = defineTask({
      name: 'send-email',
      payload: Type.Object({ recipients: Type.Array(Type.String()) }),
      handler () { told.push('handler') },
      onFailed () { told.push('onFailed') }
    })
    const { engine, logs } = await worker(t, sendEmail, { onError (error) { told.push((error as { code?: string }).code) } })
    t.match(await engine.deliver(old), { kind: 'failed', error: { code: 'FST_BGT_INVALID_PAYLOAD' } })
    t.strictSame(told, ['FST_BGT_INVALID_PAYLOAD'])
    t.match(logs.filter(({ level }) => level === 50), [{ err: { code: 'FST_BGT_INVALID_PAYLOAD', message: /recipients/ }, task: { name: 'send-email' } }])
  })

  await t.test('attempts are the worker\'s, for stored jobs too', async t => {
    const failing = (attempts: number): AnyTaskDefinition => defineTask({ name: 'send-email', retry: { attempts }, handler () { throw new Error('no') } })
    const job = { ...old, attempt: 3 }
    t.match(await (await worker(t, failing(3))).engine.deliver(job), { kind: 'failed' })
    t.match(await (await worker(t, failing(4))).engine.deliver(job), { kind: 'retry' })
  })

  await t.test('renamed: both names run, and both are looked for', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    const engine = new StubEngine()
    const { notify, sendEmail } = await changing.renamed(app, engine)
    for (const definition of [notify, sendEmail]) {
      const { id } = await app.backgroundTasks.enqueue(definition, old.payload)
      t.match((await app.inject(`/tasks/${id}`)).json(), { id, name: definition.name })
      t.match(await engine.deliver({ ...old, task: definition.name }), { kind: 'done' })
    }
    t.equal((await app.inject('/tasks/none')).statusCode, 404)
    t.strictSame(changing.outbox, Array(2).fill({ to: ['ada@example.com'], subject: 'Hello' }))
  })
})

/** Two places where jobs are really stored, and how a person asks them. */
interface Place {
  readonly engine: () => TaskEngine<unknown>
  readonly left: (name: string) => Promise<number>
  readonly retry: (name: string, id: string) => Promise<unknown>
}
const places: Record<string, (t: Test) => Promise<Place | undefined>> = {
  async BullMQ (t) {
    const redis = await openRedis(t)
    if (redis === undefined) return undefined
    const { connection, prefix } = redis
    const on = async <T>(name: string, work: (queue: Queue) => Promise<T>): Promise<T> => {
      const queue = new Queue(name, { connection: { url: connection }, prefix })
      return await work(queue).finally(() => queue.close())
    }
    return {
      engine: () => bullmq({ connection, prefix }),
      left: async name => await on(name, async queue => {
        const counts = await queue.getJobCounts('wait', 'active', 'delayed', 'prioritized')
        return Object.values(counts).reduce((sum, count) => sum + count)
      }),
      retry: async (name, id) => await on(name, async queue => await (await queue.getJob(id))?.retry())
    }
  },
  async 'pg-boss' (t) {
    const postgres = await openPostgres(t)
    if (postgres === undefined) return undefined
    const { connectionString, schema, pool } = postgres
    return {
      engine: () => pgBoss({ connectionString, schema }),
      left: async name => Number((await pool.query<{ count: string }>(`select count(*) from ${schema}.job where name = '${name}' and state < 'completed'`)).rows[0]?.count),
      async retry (name, id) {
        const boss = await new PgBoss({ connectionString, schema }).start()
        await boss.retry(name, id).finally(() => boss.stop({ graceful: false }))
      }
    }
  }
}
for (const [name, open] of Object.entries(places)) {
  t.test(`${name}: a worker that lacks a definition leaves its jobs; what was refused can be put back`, async t => {
    const place = await open(t)
    if (place === undefined) return
    const ran: unknown[] = []
    const handler = (to: unknown): void => { ran.push(to) }
    const sendEmail = defineTask({ name: 'send-email', handler })
    const other = defineTask({ name: 'other', handler })
    const web = await start(t, { tasks: [sendEmail, other], engine: place.engine(), worker: false, enqueueTimeout: 5_000 })
    const { id } = await web.app.backgroundTasks.enqueue(sendEmail, 'ada')
    await web.app.backgroundTasks.enqueue(other, 'other')
    const worker = async (...tasks: AnyTaskDefinition[]): Promise<Started> => {
      const started = await start(t, { tasks, engine: place.engine(), enqueueTimeout: 5_000 })
      await started.app.ready()
      return started
    }
    const first = await worker(other)
    await until(async () => await place.left('other') === 0)
    await first.app.close()
    t.match(await web.app.backgroundTasks.get(sendEmail, id), { state: 'pending', attempt: 0 })
    t.equal(await place.left('send-email'), 1)

    const second = await worker(defineTask({ name: 'send-email', payload: Type.Array(Type.String()), handler }))
    await until(async () => await place.left('send-email') === 0)
    await second.app.close()
    t.match(await web.app.backgroundTasks.get(sendEmail, id), { state: 'failed', attempt: 1, error: { code: 'FST_BGT_INVALID_PAYLOAD' } })

    await place.retry('send-email', id)
    await worker(sendEmail)
    await until(async () => (await web.app.backgroundTasks.get(sendEmail, id))?.state === 'succeeded')
    t.match(await web.app.backgroundTasks.get(sendEmail, id), { attempt: 1 }, 'all its attempts again')
    t.strictSame(ran, ['other', 'ada'])
  })
}

/** A shop that says what it does, and waits where it is told to. */
class TestShop implements migrating.Shop {
  readonly done: string[] = []
  saving: Promise<void> = Promise.resolve()
  mailing: Promise<void> = Promise.resolve()
  readonly saveOrder = async (): Promise<{ id: string }> => {
    this.done.push('saving')
    await this.saving
    this.done.push('saved')
    return { id: '1' }
  }

  readonly sendMail = async (to: string, subject = 'no subject'): Promise<void> => {
    this.done.push('mailing')
    await this.mailing
    this.done.push(`mailed ${to}, ${subject}`)
  }

  readonly audit = async (_id: string, statusCode: number | undefined): Promise<void> => {
    this.done.push(`audited ${String(statusCode)}`)
  }
}

t.test('migrating', async t => {
  const order = { method: 'POST', url: '/orders', payload: { email: 'ada@example.com' } } as const
  const MAILED = 'mailed ada@example.com, no subject'
  const withRoutes = async (t: Test, routes: (app: FastifyInstance, shop: migrating.Shop) => Promise<void>, options?: FastifyBackgroundTasksOptions): Promise<Started & { shop: TestShop }> => {
    const started = await start(t, options, { forceCloseConnections: true })
    const shop = new TestShop()
    await routes(started.app, shop)
    return { ...started, shop }
  }
  const isMailed = (shop: TestShop) => (): boolean => shop.done.includes(MAILED)

  await t.test('a client that disconnects while the handler runs loses the mail of a hook, not that of a task', async t => {
    for (const [routes, done] of [[migrating.onResponseBefore, ['saving', 'saved']], [migrating.after, ['saving', 'saved', 'mailing', MAILED]]] as const) {
      const { app, shop } = await withRoutes(t, routes)
      const { promise, resolve } = deferred()
      shop.saving = promise
      const closed = deferred()
      const replied = deferred()
      app.addHook('onRequest', async (_, reply) => { reply.raw.on('close', closed.resolve) })
      app.addHook('onSend', async () => { replied.resolve() })
      const socket = await connectRaw(t, app)
      socket.write(requestText('/orders', 'POST', JSON.stringify(order.payload)).replace('text/plain', 'application/json'))
      await until(() => shop.done.includes('saving'))
      socket.destroy()
      await closed.promise
      resolve()
      await replied.promise
      // The hook would have been called by the time of a turn behind the reply.
      await app.backgroundTasks.idle()
      await new Promise<void>(resolve => { app.backgroundTasks.addTask(resolve) })
      t.strictSame(shop.done, done)
    }
  })

  await t.test('a hook before it that throws skips a hook, not a task', async t => {
    const throwing = async (app: FastifyInstance): Promise<void> => {
      app.addHook('onResponse', async () => { throw new Error('no') })
    }
    const before = await withRoutes(t, async (app, shop) => {
      await throwing(app)
      await migrating.onResponseBefore(app, shop)
    })
    const after = await withRoutes(t, async (app, shop) => {
      await throwing(app)
      await migrating.after(app, shop)
    })
    for (const { app, shop } of [before, after]) {
      t.equal((await app.inject(order)).statusCode, 201)
      await app.backgroundTasks.idle()
      await new Promise<void>(resolve => { app.backgroundTasks.addTask(resolve) })
      t.equal(isMailed(shop)(), shop === after.shop)
    }
  })

  await t.test('close() waits for neither hook nor setImmediate, but for a task; and a hook holds up the request log', async t => {
    for (const routes of [migrating.onResponseBefore, migrating.setImmediateBefore]) {
      const { app, shop, logs } = await withRoutes(t, routes)
      const { promise, resolve } = deferred()
      shop.mailing = promise
      await app.inject(order)
      await until(() => shop.done.includes('mailing'))
      t.equal(logs.some(({ msg }) => msg === 'request completed'), routes === migrating.setImmediateBefore)
      await app.close()
      t.notOk(isMailed(shop)())
      resolve()
      await until(isMailed(shop))
    }
    const { app, shop, logs } = await withRoutes(t, migrating.after)
    const { promise, resolve } = deferred()
    shop.mailing = promise
    await app.inject(order)
    await until(() => shop.done.includes('mailing'))
    t.ok(logs.some(({ msg }) => msg === 'request completed'))
    const closing = app.close()
    await until(() => logs.some(({ msg }) => msg.startsWith('waiting for background tasks')))
    resolve()
    await closing
    t.ok(isMailed(shop)())
  })

  await t.test('setImmediate mails for a request that fails, before the reply is out', async t => {
    for (const [routes, mails] of [[migrating.setImmediateBefore, true], [migrating.after, false]] as const) {
      const { app, shop } = await withRoutes(t, routes)
      app.addHook('onSend', async () => {
        if (mails) await until(isMailed(shop))
        throw new Error('no')
      })
      t.equal((await app.inject(order)).statusCode, 500)
      await app.backgroundTasks.idle()
      t.equal(isMailed(shop)(), mails)
    }
  })

  await t.test('a hook for every request sees its outcome in a task', async t => {
    const { app, shop } = await withRoutes(t, async (app, shop) => {
      await migrating.auditAfter(app, shop)
      await migrating.after(app, shop)
    })
    await app.inject(order)
    await app.backgroundTasks.idle()
    await app.inject('/nowhere')
    await app.backgroundTasks.idle()
    t.strictSame(shop.done, ['saving', 'saved', 'audited 201', 'mailing', MAILED, 'audited 404'])
  })

  await t.test('BullMQ: what the old queue holds runs under a definition of its name and prefix', async t => {
    const redis = await openRedis(t)
    if (redis === undefined) return
    const { connection, prefix } = redis
    const shop = new TestShop()
    const { emails, worker } = migrating.queueBefore({ url: connection }, prefix, shop)
    t.teardown(() => emails.close())
    const before = Fastify()
    t.teardown(() => before.close())
    before.addHook('onSend', async () => { throw new Error('no') })
    await migrating.bullmqBefore(before, shop, emails)
    t.equal((await before.inject(order)).statusCode, 500)
    t.equal(await emails.getWaitingCount(), 1, 'a request that failed has its job all the same')
    await emails.add('another-name', { to: 'grace@example.com', subject: 'Hello' })

    // Its first mail fails, and is tried again.
    shop.mailing = Promise.reject(new Error('no'))
    shop.mailing.catch(() => {})
    const app = Fastify()
    t.teardown(() => app.close())
    await migrating.bullmqAfter(app, shop, connection, prefix)
    await app.ready()
    await until(() => shop.done.filter(what => what === 'mailing').length === 2)
    shop.mailing = Promise.resolve()
    await until(() => ['mailed ada@example.com, Your order', 'mailed grace@example.com, Hello'].every(mail => shop.done.includes(mail)))
    await app.close()

    shop.done.length = 0
    const web = Fastify()
    t.teardown(() => web.close())
    await migrating.bullmqAfter(web, shop, connection, `${prefix}:web`)
    t.equal((await web.inject(order)).statusCode, 201)
    await until(() => shop.done.includes('mailed ada@example.com, Your order'))

    // What the old worker makes of a new job.
    const old = worker()
    t.teardown(() => old.close())
    await emails.add('send-email', { payload: { to: 'ada@example.com', subject: 'Your order' } })
    await until(() => shop.done.includes('mailed undefined, no subject'))
  })
})

t.test('shutting down: a task closes the app without waiting for it', async t => {
  const recipes: Record<string, (app: FastifyInstance) => () => void> = {
    'and returns nothing': app => () => { void app.close() },
    'in setImmediate': app => () => { setImmediate(() => { void app.close() }) }
  }
  for (const [name, recipe] of Object.entries(recipes)) {
    await t.test(name, async t => {
      const { app, address, logs } = await start(t)
      const closed = deferred()
      app.addHook('onClose', async () => { closed.resolve() })
      app.post('/shutdown', async (request, reply) => {
        request.backgroundTasks.addTask(recipe(app))
        return await reply.code(202).send()
      })
      t.equal((await fetch(`${await address()}/shutdown`, { method: 'POST' })).status, 202)
      await closed.promise
      t.match(app.backgroundTasks.stats, { succeeded: 1, abandoned: 0 })
      t.strictSame(logs.filter(({ level }) => level >= 50), [])
    })
  }
})

t.test('which promise', async t => {
  const job = defineTask({ name: 'job', handler (name: string) { ran.push(name) } })
  const ran: string[] = []
  t.beforeEach(() => { ran.length = 0 })
  const tx = { executeSql: async () => ({ rows: [] }) }
  /** A route for each way, on an engine that may be down. */
  const ways = async (t: Test, options: FastifyBackgroundTasksOptions = {}, isDown = false): Promise<Started & { engine: StubEngine, names: () => unknown[] }> => {
    const engine = new StubEngine()
    if (isDown) engine.onEnqueue = async () => { throw new Error('connection refused') }
    const started = await start(t, { tasks: [job], engine, enqueueTimeout: 5_000, ...options }, { forceCloseConnections: true })
    const { app } = started
    app.get('/function', async request => { request.backgroundTasks.addTask(() => { ran.push('function') }) })
    app.get('/definition', async request => {
      request.backgroundTasks.addTask(() => { ran.push('function') })
      request.backgroundTasks.addTask(job, 'definition')
    })
    app.get('/enqueue', async () => await app.backgroundTasks.enqueue(job, 'enqueue'))
    app.get('/tx', async () => await app.backgroundTasks.enqueue(job, 'tx', { tx }))
    return { ...started, engine, names: () => engine.stored.flat().map(({ payload }) => payload) }
  }

  await t.test('the client disconnects: functions run, jobs are stored, and the handler goes on', async t => {
    const { app, names } = await ways(t)
    const entered = deferred()
    const closed = deferred()
    app.get('/', async (request, reply) => {
      reply.raw.on('close', closed.resolve)
      request.backgroundTasks.addTask(() => { ran.push('function') })
      request.backgroundTasks.addTask(job, 'definition')
      entered.resolve()
      await closed.promise
      ran.push('awaited')
      await app.backgroundTasks.enqueue(job, 'enqueue')
      return 'nobody reads it'
    })
    const socket = await connectRaw(t, app)
    socket.write(requestText('/'))
    await entered.promise
    socket.destroy()
    await closed.promise
    await app.backgroundTasks.idle()
    t.strictSame(ran, ['awaited', 'function'])
    t.strictSame(names(), ['enqueue', 'definition'])
  })

  await t.test('the request fails behind it: only what was enqueued is stored', async t => {
    const { app, names } = await ways(t)
    app.get('/', async request => {
      request.backgroundTasks.addTask(() => { ran.push('function') })
      request.backgroundTasks.addTask(job, 'definition')
      await app.backgroundTasks.enqueue(job, 'enqueue')
      throw new Error('no')
    })
    t.equal((await app.inject('/')).statusCode, 500)
    await app.backgroundTasks.idle()
    t.strictSame(ran, [])
    t.strictSame(names(), ['enqueue'])
  })

  await t.test('the engine is down', async t => {
    const status = async (app: FastifyInstance): Promise<unknown[]> => {
      const replies: unknown[] = []
      for (const path of ['/function', '/definition', '/enqueue', '/tx']) replies.push((await app.inject(path)).statusCode)
      await app.backgroundTasks.idle()
      return replies
    }
    t.strictSame(await status((await ways(t, {}, true)).app), [200, 503, 503, 503])
    t.strictSame(ran, ['function'], 'the functions of a request that failed for its job are skipped')
    ran.length = 0
    const { app, logs } = await ways(t, { fallback: 'local' }, true)
    t.strictSame(await status(app), [200, 200, 200, 503], 'what belongs to a transaction does not run without it')
    t.strictSame(ran.sort(), ['definition', 'enqueue', 'function', 'function'])
    t.equal(logs.filter(({ level, msg }) => level === 40 && msg.includes('it runs here')).length, 2)
  })

  await t.test('without an engine, enqueue adds to this process, and tx is refused', async t => {
    const { app } = await start(t, { tasks: [job] })
    t.match(await app.backgroundTasks.enqueue(job, 'local'), { duplicate: false })
    await app.backgroundTasks.idle()
    t.strictSame(ran, ['local'])
    await t.rejects(app.backgroundTasks.enqueue(job, 'tx', { tx }), { code: 'FST_BGT_UNSUPPORTED' })
  })

  await t.test('a local definition that would start again behind the deadline is named at once', async t => {
    const failing = defineTask({ name: 'failing', retry: { backoff: { type: 'fixed', delay: 60_000 } }, handler () { throw new Error('no') } })
    const { app, logs } = await start(t, { tasks: [failing], closeTimeout: 50_000 })
    app.backgroundTasks.addTask(failing, undefined)
    await until(() => logs.some(({ level }) => level === 40))
    await app.close()
    t.match(logs.filter(({ level }) => level === 50), [{ msg: /abandoned.*failing/ }])
  })
})
