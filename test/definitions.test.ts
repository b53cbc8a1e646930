import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { Type } from '@sinclair/typebox'
import type { FastifyTypeProviderDefault } from 'fastify'
import { type } from 'arktype'
import * as v from 'valibot'
import t from 'tap'
import { z } from 'zod'
import { defineTask, type AnyTaskDefinition, type BackgroundTask, type TaskEnqueueMessage } from '../lib/index.js'
import { deferred, start } from './support/app.js'
import { ownClock } from './support/clock.js'

const turn = (): Promise<void> => new Promise(resolve => { setImmediate(resolve) })

const noBackoff = { backoff: { type: 'fixed', delay: 1 } } as const
const payload = Type.Object({ to: Type.String({ format: 'email' }), copies: Type.Optional(Type.Integer({ default: 1 })) })

/** A Standard Schema by hand. */
function standard (validate: (value: unknown) => unknown): object {
  return { '~standard': { version: 1, vendor: 'by hand', validate } }
}

t.test('a definition runs in the list of its request, in the order of the calls', async t => {
  const ran: string[] = []
  const step = defineTask({ name: 'step', handler: async (name: string) => { await turn(); ran.push(name) } })
  const { app } = await start(t, { tasks: [step] })
  app.get('/', async request => {
    request.backgroundTasks.addTask(() => { ran.push('function') })
    request.backgroundTasks.addTask(step, 'definition')
    request.backgroundTasks.addTask(() => { ran.push('last') })
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['function', 'definition', 'last'])
})

t.test('a payload takes a JSON round trip, and the handler gets the output of its schema', async t => {
  const got: unknown[] = []
  const mail = defineTask({ name: 'mail', payload, handler (payload) { got.push(payload) } })
  const when = defineTask({ name: 'when', payload: z.object({ at: z.iso.datetime().transform(text => new Date(text)) }), handler ({ at }) { got.push(at) } })
  const any = defineTask.withTypeProvider<FastifyTypeProviderDefault>()({ name: 'any', payload: {}, handler (payload) { got.push(payload) } })
  const { app } = await start(t, { tasks: [mail, when, any] })
  const sent = { to: 'ada@example.com', extra: undefined }
  app.backgroundTasks.addTask(mail, sent)
  sent.to = 'changed after the call'
  app.backgroundTasks.addTask(when, { at: '2026-01-02T03:04:05Z' })
  app.backgroundTasks.addTask(any, { date: new Date(0), no: undefined, list: [undefined, NaN] })
  app.backgroundTasks.addTask(any)
  await app.backgroundTasks.idle()
  t.strictSame(got, [
    { to: 'ada@example.com', copies: 1 },
    new Date('2026-01-02T03:04:05Z'),
    { date: '1970-01-01T00:00:00.000Z', list: [null, null] },
    null
  ])
})

t.test('each attempt has a payload of its own', async t => {
  const got: string[] = []
  const spoil = defineTask({
    name: 'spoil',
    retry: { attempts: 2, ...noBackoff },
    handler (payload: { word: string }) {
      got.push(payload.word)
      payload.word = 'spoilt'
      throw new Error('again')
    }
  })
  const { app } = await start(t, { tasks: [spoil] })
  app.backgroundTasks.addTask(spoil, { word: 'fresh' })
  await app.backgroundTasks.idle()
  t.strictSame(got, ['fresh', 'fresh'])
})

t.test('an invalid payload is refused with path and reason, and never the value', async t => {
  const secret = 'hunter2'
  const cyclic: Record<string, unknown> = { secret }
  cyclic['self'] = cyclic
  const asyncSchema = z.object({ to: z.string().refine(async () => true) })
  const cases: Array<[schema: object | undefined, payload: unknown, reason: string]> = [
    [payload, { to: secret }, 'is invalid: /to must match format "email"'],
    [payload, { to: 'a@example.com', copies: '2' }, 'is invalid: /copies must be integer'],
    [payload, undefined, 'is invalid: it must be object'],
    [Type.Object({}, { additionalProperties: false }), { more: secret }, 'is invalid: it must NOT have additional properties (more)'],
    [{ type: 'object', properties: { list: { type: 'array', items: { type: 'number' } } } }, { list: [1, secret] }, 'is invalid: /list/1 must be number'],
    [z.object({ n: z.number() }), { n: secret }, 'is invalid: /n must be number'],
    [z.object({ n: z.string().max(3) }), { n: secret }, 'is invalid: /n is refused by its schema (too_big)'],
    [v.object({ n: v.array(v.number()) }), { n: [1, secret] }, 'is invalid: /n/1 must be number'],
    [v.object({ n: v.pipe(v.string(), v.email()) }), { n: secret }, 'is invalid: /n is refused by its schema (email)'],
    [type({ n: 'string.email' }) as unknown as object, { n: secret }, 'is invalid: /n must be an email address'],
    [standard(() => ({ issues: [] })), secret, 'is invalid: it is refused by its schema'],
    [standard(() => ({ issues: [{ message: secret, path: ['list', { key: 2 }], kind: 'schema' }] })), secret, 'is invalid: /list/2 is refused by its schema (schema)'],
    [asyncSchema, { to: secret }, 'has an asynchronous schema, and addTask is synchronous'],
    [undefined, cyclic, 'is not JSON: Converting circular structure to JSON'],
    [undefined, 1n, 'is not JSON: Do not know how to serialize a BigInt'],
    [undefined, () => secret, 'is not JSON: it is a function'],
    [undefined, { toJSON () { throw new Error(secret) } }, 'is not JSON: its toJSON threw']
  ]
  for (const [schema, value, reason] of cases) {
    const task = defineTask<unknown>({ name: 'checked', ...schema !== undefined && { payload: schema }, handler () {} })
    const { app } = await start(t, { tasks: [task] })
    t.throws(() => app.backgroundTasks.addTask(task, value), {
      code: 'FST_BGT_INVALID_PAYLOAD', statusCode: 500, message: `The payload of the task "checked" ${reason}`
    })
    t.equal(app.backgroundTasks.length, 0, 'nothing was added')
  }
})

t.test('a failed attempt starts again by the policy, and holds up nothing else', async t => {
  const ran: string[] = []
  const flaky = defineTask({
    name: 'flaky',
    retry: { attempts: 3, backoff: { delay: 20 } },
    async handler (_: undefined, { attempt, signal }) {
      ran.push(`attempt ${attempt}${signal.aborted ? ', aborted' : ''}`)
      if (attempt < 3) throw new Error('not yet')
      return { attempt }
    }
  })
  const { app, logs } = await start(t, { tasks: [flaky], stopOnError: true })
  let id = ''
  app.get('/', async request => {
    id = request.backgroundTasks.addTask(flaky).id
    request.backgroundTasks.addTask(() => { ran.push('function') })
    request.backgroundTasks.addCleanup(() => { ran.push('cleanup') })
  })
  await app.inject('/')
  await app.backgroundTasks.idle({ rejectOnFailure: true })
  t.strictSame(ran, ['attempt 1', 'function', 'attempt 2', 'attempt 3', 'cleanup'])
  const record = await app.backgroundTasks.get(flaky, id)
  t.match(record, { state: 'succeeded', attempt: 3, result: { attempt: 3 } })
  t.notOk('error' in (record ?? {}), 'what was mended is no error any more')
  t.match(app.backgroundTasks.stats, { pending: 0, running: 0, succeeded: 2, failed: 0 })
  const warned = logs.filter(({ level }) => level === 40)
  t.match(warned, [
    { msg: 'background task attempt failed: the next one is in 20 ms', task: { id, name: 'flaky' }, err: { message: 'not yet' }, reqId: 'req-1' },
    { msg: 'background task attempt failed: the next one is in 40 ms' }
  ])
})

t.test('behind the last attempt the task has failed: one error line, onError, onFailed once', async t => {
  const told: unknown[] = []
  const doomed = defineTask({
    name: 'doomed',
    retry: { attempts: 2, ...noBackoff },
    handler (_: { n: number }) { throw Object.assign(new TypeError('no'), { code: 'E_NO' }) },
    async onFailed (payload, error, { id, attempts, app, log }) {
      await turn()
      told.push('onFailed', payload, (error as Error).message, id, attempts, app.backgroundTasks !== undefined, typeof log.info)
      throw new Error('onFailed fails too')
    }
  })
  const { app, logs } = await start(t, { tasks: [doomed], onError: async () => { await turn(); told.push('onError') } })
  const task = app.backgroundTasks.addTask(doomed, { n: 1 })
  await t.rejects(app.backgroundTasks.idle({ rejectOnFailure: true }), { message: 'no' })
  t.strictSame(told, ['onError', 'onFailed', { n: 1 }, 'no', task.id, 2, true, 'function'])
  t.equal(task.state, 'failed')
  t.match(await app.backgroundTasks.get(doomed, task.id), { state: 'failed', attempt: 2, error: { name: 'TypeError', message: 'no', code: 'E_NO' } })
  t.match(logs.filter(({ level }) => level === 50), [
    { msg: 'background task failed', task: { id: task.id, name: 'doomed' } },
    { msg: 'onFailed of a background task failed', err: { message: 'onFailed fails too' } }
  ])
})

t.test('retry.when false, or throwing, is the last word', async t => {
  let starts = 0
  const picky = defineTask({
    name: 'picky', retry: { ...noBackoff, when: error => error !== 'no' }, handler () { starts++; throw 'no' } // eslint-disable-line no-throw-literal
  })
  const broken = defineTask({ name: 'broken', retry: { when () { throw new Error('when') } }, handler () { starts++; throw null } }) // eslint-disable-line no-throw-literal
  const { app } = await start(t, { tasks: [picky, broken] })
  const tasks = [app.backgroundTasks.addTask(picky), app.backgroundTasks.addTask(broken)]
  await app.backgroundTasks.idle()
  t.equal(starts, 2)
  t.strictSame(tasks.map(({ state }) => state), ['failed', 'failed'])
  t.match(await app.backgroundTasks.get(picky, tasks[0]?.id ?? ''), { error: { name: 'Error', message: 'a string was thrown' } })
})

t.test('the record of an ended task holds no payload', { skip: globalThis.gc === undefined && 'needs --expose-gc' }, async t => {
  const big = defineTask({ name: 'big', handler (_: string) {} })
  const { app } = await start(t, { tasks: [big] })
  await app.ready()
  const used = (): number => {
    globalThis.gc?.()
    return process.memoryUsage().heapUsed
  }
  const before = used()
  const tasks = Array.from({ length: 40 }, (_, i) => app.backgroundTasks.addTask(big, String(i).repeat(500_000)))
  await app.backgroundTasks.idle()
  t.ok(used() - before < 10_000_000)
  t.match(await app.backgroundTasks.get(big, tasks[0]?.id ?? ''), { state: 'succeeded' })
})

t.test('a handler that itself refuses a payload has failed like any other: it is retried, and onFailed is called', async t => {
  const told: unknown[] = []
  const inner = defineTask({ name: 'inner', payload: Type.String(), handler () {} })
  const outer = defineTask({
    name: 'outer',
    retry: { attempts: 2, ...noBackoff },
    handler (_: undefined, { app }) { app.backgroundTasks.addTask(inner, 7 as never) },
    onFailed (_payload, error, { attempts }) { told.push((error as { code: string }).code, attempts) }
  })
  const { app } = await start(t, { tasks: [inner, outer] })
  app.backgroundTasks.addTask(outer)
  await app.backgroundTasks.idle()
  t.strictSame(told, ['FST_BGT_INVALID_PAYLOAD', 2])
})

t.test('an attempt that times out has failed: its signal aborts, the next one has a new one', async t => {
  const reasons: unknown[] = []
  const slow = defineTask({
    name: 'slow',
    timeout: 20,
    retry: { attempts: 2, ...noBackoff },
    handler: async (_: undefined, context) => {
      // Handlers that wrap others add to what they pass on.
      const passedOn = { ...context, more: true }
      const { attempt, signal } = passedOn
      if (attempt === 2) return 'in time'
      t.equal(signal, context.signal)
      signal.addEventListener('abort', () => { reasons.push((signal.reason as { code: string }).code) })
      await new Promise(() => {})
      return 'never'
    }
  })
  const { app } = await start(t, { tasks: [slow], concurrency: 1 })
  const task = app.backgroundTasks.addTask(slow)
  await app.backgroundTasks.idle({ rejectOnFailure: true })
  t.strictSame(reasons, ['FST_BGT_TIMEOUT'])
  t.match(await app.backgroundTasks.get(slow, task.id), { state: 'succeeded', attempt: 2, result: 'in time' })
})

t.test('a delayed task starts when its time has come; a cancelled one never', async t => {
  const ran: string[] = []
  const log = defineTask({
    name: 'log',
    handler (name: string, { app }) {
      ran.push(name)
      t.match(app.backgroundTasks.stats, { running: 1 })
    }
  })
  const { app } = await start(t, { tasks: [log] })
  const clock = ownClock(t)
  const cancelled = deferred()
  let late: BackgroundTask | undefined
  app.get('/', async request => {
    late = request.backgroundTasks.addTask(log, 'late', { delay: 40 })
    const never = request.backgroundTasks.addTask(log, 'never', { delay: 30 })
    request.backgroundTasks.addTask(log, 'at once')
    request.backgroundTasks.addTask(async () => {
      await turn()
      never.cancel()
      cancelled.resolve()
    })
    request.backgroundTasks.addCleanup(() => { ran.push('cleanup') })
  })
  await app.inject('/')
  await cancelled.promise
  await clock.pass(39)
  t.strictSame(ran, ['at once'])
  t.match(await app.backgroundTasks.get(log, late?.id ?? ''), { state: 'delayed' })
  t.equal(app.backgroundTasks.stats.oldestPendingMs, 39)
  await clock.pass(1)
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['at once', 'late', 'cleanup'])
})

t.test('a list whose last delayed task is cancelled ends, cleanups and all', async t => {
  const ran: string[] = []
  const log = defineTask({ name: 'log', handler (name: string) { ran.push(name) } })
  const { app } = await start(t, { tasks: [log] })
  app.get('/', async request => {
    const task = request.backgroundTasks.addTask(log, 'never', { delay: 10_000 })
    request.backgroundTasks.addTask(() => { setTimeout(() => { task.cancel() }, 20) })
    request.backgroundTasks.addCleanup(() => { ran.push('cleanup') })
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['cleanup'])
  t.match(app.backgroundTasks.stats, { pending: 0, skipped: 1, succeeded: 1 })
})

t.test('a key is an id: the second task of it does not run while the first has a record', async t => {
  const ran: string[] = []
  const charge = defineTask({ name: 'charge', keep: { succeeded: 0.05 }, handler (order: string) { ran.push(order) } })
  const refund = defineTask({ name: 'refund', handler () {} })
  const { app, logs } = await start(t, { tasks: [charge, refund] })
  app.get<{ Querystring: { fail?: string } }>('/', async request => {
    const { id } = request.backgroundTasks.addTask(charge, `order 1${request.query.fail ?? ''}`, { key: 'order 1' })
    if (request.query.fail !== undefined) throw new Error('no')
    return { id }
  })
  // The one that was skipped with its exchange is in nobody's way.
  await app.inject('/?fail=,failed')
  const first = (await app.inject('/')).json<{ id: string }>()
  await app.backgroundTasks.idle()
  const second = (await app.inject('/')).json<{ id: string }>()
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['order 1'])
  t.equal(first.id, second.id)
  t.match(first.id, /^[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/)
  t.match(await app.backgroundTasks.get(charge, second.id), { state: 'succeeded', attempt: 1 })
  t.match(logs.at(-1), { reason: 'another task of its key was first' })
  t.not(app.backgroundTasks.addTask(refund, undefined, { key: 'order 1' }).id, first.id, 'a key belongs to its definition')
  await new Promise(resolve => { setTimeout(resolve, 60) })
  t.equal(await app.backgroundTasks.get(charge, first.id), undefined, 'its record has gone')
  t.strictSame(await app.backgroundTasks.enqueue(charge, 'order 1 again', { key: 'order 1' }), { id: first.id, duplicate: false })
  t.strictSame(await app.backgroundTasks.enqueue(charge, 'order 1 again', { key: 'order 1' }), { id: first.id, duplicate: true })
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['order 1', 'order 1 again'])
})

t.test('get tells the whole life of a task', async t => {
  const gate = deferred()
  const started = deferred()
  const work = defineTask({ name: 'work', async handler () { started.resolve(); await gate.promise } })
  const other = defineTask({ name: 'other', handler () { return 1n } })
  const unknown = defineTask({ name: 'unknown', handler () {} })
  const { app, logs } = await start(t, { tasks: [work, other] })
  const states: unknown[] = []
  const { id } = await app.backgroundTasks.enqueue(work)
  const see = async (): Promise<void> => {
    const { state, attempt, startedAt, finishedAt } = await app.backgroundTasks.get(work, id) ?? {}
    states.push([state, attempt, typeof startedAt, typeof finishedAt])
  }
  await see()
  await started.promise
  await see()
  gate.resolve()
  await app.backgroundTasks.idle()
  await see()
  t.strictSame(states, [['pending', 0, 'undefined', 'undefined'], ['running', 1, 'string', 'undefined'], ['succeeded', 1, 'string', 'string']])
  t.equal(await app.backgroundTasks.get(other, id), undefined, 'an id belongs to its definition')
  t.equal(await app.backgroundTasks.get(work, 'none'), undefined)
  await t.rejects(app.backgroundTasks.get(unknown, id), { code: 'FST_BGT_UNKNOWN_TASK', message: 'The definition "unknown" is not one of the app\'s: add it to the option "tasks" of register, which has work, other' })
  const { id: odd } = await app.backgroundTasks.enqueue(other)
  await app.backgroundTasks.idle({ rejectOnFailure: true })
  t.match(await app.backgroundTasks.get(other, odd), { state: 'succeeded' }, 'a result that is not JSON does not undo the work')
  t.match(logs.at(-1), { level: 40, msg: 'the result of a background task is not JSON: it is not kept' })
})

t.test('the history is bounded', async t => {
  const small = defineTask({ name: 'small', handler () {} })
  const { app } = await start(t, { tasks: [small] })
  const ids: string[] = []
  for (let i = 0; i < 2_001; i++) ids.push(app.backgroundTasks.addTask(small).id)
  await app.backgroundTasks.idle()
  t.equal(await app.backgroundTasks.get(small, ids[0] ?? ''), undefined)
  t.match(await app.backgroundTasks.get(small, ids[2_000] ?? ''), { state: 'succeeded' })
})

t.test('what a placement cannot do, and what nobody knows, is refused at the call', async t => {
  const known = defineTask({ name: 'known', handler () {} })
  const { app } = await start(t, { tasks: [known] })
  const none = await start(t)
  const tasks = app.backgroundTasks
  const twin = defineTask({ name: 'known', handler () {} })
  t.throws(() => tasks.addTask(twin), { code: 'FST_BGT_UNKNOWN_TASK', message: /it is another one of that name/ })
  t.throws(() => none.app.backgroundTasks.addTask(known), { code: 'FST_BGT_UNKNOWN_TASK', message: /which has none$/ })
  t.throws(() => tasks.with({ name: 'other' }).addTask(known), { code: 'FST_BGT_INVALID_OPTION', message: /a definition has a name, "known"/ })
  t.throws(() => tasks.addTask(known, undefined, { key: '' }), { code: 'FST_BGT_INVALID_OPTION', message: 'The option "key" of addTask accepts a string that is not empty; received \'\'' })
  t.throws(() => tasks.addTask(known, undefined, { delay: -1 }), { code: 'FST_BGT_INVALID_OPTION' })
  t.throws(() => tasks.addTask(known, undefined, { priority: 1 } as object), { code: 'FST_BGT_INVALID_OPTION', message: /has no option "priority"; it accepts key, delay/ })
  await t.rejects(tasks.enqueue(known, undefined, null as never), { code: 'FST_BGT_INVALID_OPTION', message: /^enqueue accepts an object of options; received null/ })
  await t.rejects(tasks.enqueue(known, undefined, { priority: 1 } as object), { code: 'FST_BGT_INVALID_OPTION', message: /enqueue has no option "priority"; it accepts key, delay, tx/ })
  t.throws(() => defineTask({} as never), { code: 'FST_BGT_INVALID_OPTION', message: 'defineTask needs the option "name"; received none' })
  const misuses: Array<[Promise<unknown>, string]> = [
    [tasks.enqueue(console.log as never), 'enqueue accepts a definition, which defineTask makes; received the function log'],
    [tasks.enqueue((() => {}) as never), 'enqueue accepts a definition, which defineTask makes; received the function (anonymous)'],
    [tasks.get('known' as never, 'id'), 'get accepts a definition, which defineTask makes; received a string'],
    [tasks.get(known, undefined as never), 'get accepts a definition and the id of a task; received undefined for the id']
  ]
  for (const [call, message] of misuses) await t.rejects(call, { code: 'FST_BGT_INVALID_TASK', message })
  const tx = { executeSql: async () => ({}) }
  await t.rejects(tasks.enqueue(known, undefined, { tx }), { code: 'FST_BGT_UNSUPPORTED', statusCode: 500, message: 'An app without an engine does not support "tx", which was asked for the task "known"; it supports delay, key, get' })
  await app.close()
  await t.rejects(tasks.enqueue(known), { code: 'FST_BGT_CLOSED', message: 'enqueue was called after the app had closed' })
  await t.rejects(tasks.get(known, 'id'), { code: 'FST_BGT_CLOSED' })
  t.equal(tasks.addTask(known).state, 'abandoned')
})

t.test('a wrong definition is refused when it is made, a wrong list of them at register', async t => {
  const handler = (): void => {}
  const refused: Array<[options: object, message: RegExp]> = [
    [{ handler }, /needs the option "name"/],
    [{ name: 'a' }, /needs the option either "handler" or "file"/],
    [{ name: 'a:b', handler }, /"name" of defineTask accepts letters, digits, "-", "_" and "."; received 'a:b'/],
    [{ name: 'a', handler: 1 }, /"handler" of defineTask accepts a function/],
    [{ name: 'a', handler, timeout: 0 }, /"timeout"/],
    [{ name: 'a', handler, when: 'never' }, /"when"/],
    [{ name: 'a', handler, payload: 1 }, /"payload" of defineTask accepts a JSON Schema or a Standard Schema/],
    [{ name: 'a', handler, retry: { attempts: 0 } }, /"attempts" of retry of the task "a"/],
    [{ name: 'a', handler, retry: { times: 1 } }, /retry of the task "a" has no option "times"/],
    [{ name: 'a', handler, retry: { backoff: { type: 'linear' } } }, /"type" of backoff of the task "a" accepts 'exponential' or 'fixed'/],
    [{ name: 'a', handler, keep: { succeeded: -1 } }, /"succeeded" of keep of the task "a"/],
    [{ name: 'a', handler, payload: v.objectAsync({}) }, /accepts a synchronous schema/],
    [{ name: 'a', handler, payload: standard(async () => { throw new Error('later') }) }, /accepts a synchronous schema/],
    [{ name: 'a', handler, retries: 1 }, /defineTask has no option "retries"/]
  ]
  for (const [options, message] of refused) {
    t.throws(() => defineTask(options as { name: string, handler: () => void }), { code: 'FST_BGT_INVALID_OPTION', message })
  }
  t.doesNotThrow(() => defineTask({ name: 'a', payload: standard(() => { throw new Error('of undefined') }), handler } as never))
  const task = defineTask({ name: 'a', handler })
  const twin = defineTask({ name: 'a', handler })
  const odd = defineTask({ name: 'odd', payload: { type: 'nothing' }, handler })
  await t.rejects(start(t, { tasks: [task, twin] }), { code: 'FST_BGT_DUPLICATE_TASK', message: /"a"/ })
  await t.rejects(start(t, { tasks: [{ name: 'a' } as unknown as AnyTaskDefinition] }), { code: 'FST_BGT_INVALID_OPTION', message: /what defineTask returns/ })
  await t.rejects(start(t, { tasks: [odd] }), { code: 'FST_BGT_INVALID_OPTION', message: /"payload" of the task "odd".*cannot be compiled/ })
})

t.test('schemas may refer to the shared schemas of the app', async t => {
  const { default: Fastify } = await import('fastify')
  const { default: backgroundTasks } = await import('../lib/index.js')
  const task = defineTask<{ to: string }>({ name: 'ref', payload: { type: 'object', properties: { to: { $ref: 'address#' } } }, handler () {} })
  const app = Fastify()
  t.teardown(() => app.close())
  app.addSchema({ $id: 'address', type: 'string', format: 'email' })
  await app.register(backgroundTasks, { tasks: [task] })
  t.throws(() => app.backgroundTasks.addTask(task, { to: 'nobody' }), { message: /\/to must match format "email"/ })
})

t.test('trace context and request id travel; a subscriber may add to the headers', async t => {
  const got: unknown[] = []
  const traced = defineTask({ name: 'traced', handler (_: undefined, { headers, requestId }) { got.push(headers, requestId) } })
  const { app } = await start(t, { tasks: [traced] })
  const add = (message: unknown): void => { (message as TaskEnqueueMessage).headers['x-tenant'] = '7' }
  subscribe('fastify-background-tasks.enqueue', add)
  t.teardown(() => unsubscribe('fastify-background-tasks.enqueue', add))
  app.get('/', async request => { request.backgroundTasks.addTask(traced) })
  await app.inject({ url: '/', headers: { traceparent: '00-1-2-01', cookie: 'secret' } })
  await app.backgroundTasks.idle()
  t.strictSame(got, [{ traceparent: '00-1-2-01', 'x-tenant': '7' }, 'req-1'])
})

t.test('when of a definition, and of with, decide as for functions', async t => {
  const ran: string[] = []
  const report = defineTask({ name: 'report', when: 'error', handler (name: string) { ran.push(name) } })
  const { app } = await start(t, { tasks: [report] })
  app.get('/ok', async request => {
    request.backgroundTasks.addTask(report, 'ok')
    request.backgroundTasks.with({ when: 'always' }).addTask(report, 'always')
  })
  app.get('/failed', async request => {
    request.backgroundTasks.addTask(report, 'failed')
    throw new Error('no')
  })
  await app.inject('/ok')
  await app.inject('/failed')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['always', 'failed'])
})

t.test('the drain waits for retries and delays whose time comes before its deadline, and names the others at once', async t => {
  const ran: string[] = []
  const task = defineTask({
    name: 'task', retry: { attempts: 2, backoff: { delay: 50 } }, handler (name: string, { attempt }) { ran.push(name); if (name === 'retried' && attempt === 1) throw new Error('once') }
  })
  const { app, logs } = await start(t, { tasks: [task] })
  await app.ready()
  app.backgroundTasks.addTask(task, 'retried')
  app.backgroundTasks.addTask(task, 'soon', { delay: 30 })
  app.backgroundTasks.addTask(task, 'tomorrow', { delay: 86_400_000 })
  const startedAt = Date.now()
  await app.close()
  t.ok(Date.now() - startedAt < 5_000)
  t.strictSame(ran, ['retried', 'soon', 'retried'])
  t.match(logs.at(-1), { level: 50, msg: 'background tasks abandoned, because their time comes after closeTimeout: task', tasks: [{ name: 'task' }] })
})

t.test('oldestPendingMs is the age of the oldest task, also of one that came back after younger ones', async t => {
  const late = defineTask({ name: 'late', handler () {} })
  const { app } = await start(t, { tasks: [late] })
  const gate = deferred()
  let id = ''
  let between = 0
  app.get('/', async request => {
    id = request.backgroundTasks.addTask(late, undefined, { delay: 20 }).id
    request.backgroundTasks.addTask(() => gate.promise)
    await new Promise(resolve => { setTimeout(resolve, 2) })
    between = performance.now()
    await new Promise(resolve => { setTimeout(resolve, 2) })
    request.backgroundTasks.addTask(() => {})
  })
  await app.inject('/')
  while ((await app.backgroundTasks.get(late, id))?.state !== 'pending') await new Promise(resolve => { setTimeout(resolve, 5) })
  const now = performance.now()
  t.ok(app.backgroundTasks.stats.oldestPendingMs >= now - between)
  gate.resolve()
  await app.backgroundTasks.idle()
  t.equal(app.backgroundTasks.stats.oldestPendingMs, 0)
})
