/** The option `context`: a value of the request is there around each attempt of its tasks, in whatever process they run. */
import { AsyncLocalStorage } from 'node:async_hooks'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyRequest } from 'fastify'
import t from 'tap'
import { defineTask, type FastifyBackgroundTasksOptions, type TaskContextOptions } from '../lib/index.js'
import { recordTasks } from '../lib/testing.js'
import { start } from './support/app.js'
import { StubEngine } from './support/stub-engine.js'

interface Tenant { id: string }
const tenants = new AsyncLocalStorage<Tenant>()
const context: TaskContextOptions = {
  capture: request => request.headers['x-tenant'] === undefined ? undefined : { id: request.headers['x-tenant'] },
  restore: (value: Tenant, run) => tenants.run(value, run)
}
const found: Array<string | [what: string, tenant: unknown]> = []
const note = defineTask({
  name: 'note',
  retry: { attempts: 2, backoff: { delay: 1 } },
  async handler (what: string) {
    await sleep(1)
    found.push([what, tenants.getStore()])
    if (what === 'fails') throw new Error('no')
    return what
  },
  onFailed (what) { found.push([`onFailed ${what}`, tenants.getStore()]) }
})
t.beforeEach(() => { found.length = 0 })

t.test('the value is there in each attempt and in onFailed, and the payload and the log have none of it', async t => {
  const { app, logs } = await start(t, { tasks: [note], context })
  app.get<{ Params: { what: string } }>('/:what', async request => {
    const { id } = request.backgroundTasks.addTask(note, request.params.what)
    await app.backgroundTasks.enqueue(note, 'enqueued')
    return { id }
  })
  const { id } = (await app.inject({ url: '/fails', headers: { 'x-tenant': 'secret' } })).json<{ id: string }>()
  await app.inject('/without')
  await app.backgroundTasks.idle()
  const tenant = { id: 'secret' }
  t.strictSame(found.filter(([what]) => what !== 'enqueued'), [['fails', tenant], ['without', undefined], ['fails', tenant], ['onFailed fails', tenant]])
  t.strictSame(found.filter(([what]) => what === 'enqueued'), Array(2).fill(['enqueued', undefined]), 'enqueue captures nothing')
  t.notMatch(JSON.stringify([logs, await app.backgroundTasks.get(note, id)]), 'secret')
})

t.test('it is stored beside the payload, and restored where an engine delivers the job; a job without one runs without', async t => {
  const engine = new StubEngine()
  const { app, logs } = await start(t, { tasks: [note], context, engine })
  app.get('/', async request => { request.backgroundTasks.addTask(note, 'stored') })
  await app.inject({ url: '/', headers: { 'x-tenant': 'a' } })
  const job = engine.stored.flat()[0]
  t.match(job, { payload: 'stored', context: '{"id":"a"}' })
  t.strictSame(await engine.deliver({ task: 'note', payload: 'delivered', context: job?.context }), { kind: 'done', result: 'delivered' })
  for (const odd of [undefined, 'no JSON', `"${'x'.repeat(5_000)}"`]) await engine.deliver({ task: 'note', payload: 'odd', context: odd })
  t.strictSame(found, [['delivered', { id: 'a' }], ...Array(3).fill(['odd', undefined])])
  t.match(logs.filter(({ level }) => level === 40), [{ msg: 'background task "note" has a context that no app of this package has stored: it runs without' }], 'one warning')
  const other = new StubEngine()
  const without = await start(t, { tasks: [note], engine: other })
  await without.app.ready()
  for (let i = 0; i < 2; i++) await other.deliver({ task: 'note', payload: 'no option', context: '{"id":"a"}' })
  t.match(without.logs.filter(({ level }) => level === 40), [{ msg: 'background task "note" has a context, and this app has no option "context": it runs without' }], 'one warning')
  t.strictSame(found.slice(-2), Array(2).fill(['no option', undefined]))
})

t.test('a capture that throws, or gives what cannot be stored, fails the addTask', async t => {
  const circular: Record<string, unknown> = {}
  circular['self'] = circular
  const captures: Array<[capture: () => unknown, message: RegExp]> = [
    [() => { throw new Error('secret') }, /context cannot be captured: the option "context.capture" threw$/],
    [async () => await Promise.reject(new Error('secret')), /context is a promise: the option "context.capture" is called synchronously$/],
    [() => circular, /context is not JSON$/],
    [() => 1n, /context is not JSON$/],
    [() => ({ get then () { throw new Error('secret') } }), /context is not JSON$/],
    [() => () => {}, /context is the function \(anonymous\), which is not JSON$/],
    [() => 'ü'.repeat(2_048), /context has 4098 bytes as JSON, and 4096 are accepted$/]
  ]
  for (const [capture, message] of captures) {
    const { app } = await start(t, { tasks: [note], context: { ...context, capture } })
    app.get('/', async request => { request.backgroundTasks.addTask(note, 'x') })
    const reply = await app.inject('/')
    t.match([reply.statusCode, reply.json()], [500, { code: 'FST_BGT_INVALID_PAYLOAD', message }])
    t.notMatch(reply.body, 'secret')
  }
  t.strictSame(found, [])
})

t.test('a restore that throws, rejects or does not call run fails the attempt; one that calls twice makes one', async t => {
  const restores: Array<[restore: TaskContextOptions['restore'], kind: string, message: RegExp | undefined]> = [
    [() => { throw new Error('thrown') }, 'failed', /^thrown$/],
    [async () => { throw new Error('rejected') }, 'failed', /^rejected$/],
    [() => undefined, 'failed', /has to call run/],
    [async () => {}, 'failed', /has to call run/],
    [(_value, run) => { void run(); return run() }, 'done', undefined],
    [async (_value, run) => { await sleep(1); void run() }, 'done', undefined],
    [(_value, run) => { void run() }, 'done', undefined]
  ]
  const once = defineTask({ name: 'once', retry: { attempts: 1 }, async handler () { await sleep(1); found.push('ran'); return 'result' }, onFailed () { found.push('onFailed') } })
  for (const [restore, kind, message] of restores) {
    found.length = 0
    const engine = new StubEngine()
    const { app, logs } = await start(t, { tasks: [once], context: { ...context, restore }, engine })
    await app.ready()
    const verdict = await engine.deliver({ task: 'once', context: '1' })
    t.match(verdict, { kind, ...message === undefined ? { result: 'result' } : { error: { message } } })
    t.strictSame(found, kind === 'done' ? ['ran'] : [])
    t.equal(logs.filter(({ msg }) => msg === 'onFailed of a background task failed').length, kind === 'done' ? 0 : 1)
  }
})

t.test('whatever restore does with run, the attempt is made once, ends before the next one starts, and fails with the first error', async t => {
  const late: Array<() => unknown> = []
  const restores: Array<[restore: TaskContextOptions['restore'], message: RegExp]> = [
    // A handler that throws synchronously.
    [(_value, run) => { try { return run() } catch { return undefined } }, /^handler$/],
    [(_value, run) => { try { return run() } catch { return run() } }, /^handler$/],
    // A handler that rejects later.
    [async (_value, run) => { try { await run() } catch {} }, /^handler$/],
    [(_value, run) => { void run(); throw new Error('restore') }, /^restore$/],
    [async (_value, run) => { void run(); throw new Error('restore') }, /^restore$/],
    [async (_value, run) => { void run(); await sleep(20) }, /^handler$/],
    // A call that comes too late.
    [(_value, run) => { late.push(run) }, /has to call run/]
  ]
  for (const [index, [restore, message]] of restores.entries()) {
    found.length = 0
    let running = 0
    const fails = defineTask({
      name: 'fails',
      retry: { attempts: 2, backoff: { delay: 1 } },
      handler () {
        found.push(`ran beside ${running}`)
        if (index < 2) throw new Error('handler')
        running++
        return sleep(5).then(() => { running--; throw new Error('handler') })
      }
    })
    const { app } = await start(t, { tasks: [fails], context: { capture: () => null, restore } })
    app.get('/', async request => request.backgroundTasks.addTask(fails, null).id)
    const { body: id } = await app.inject('/')
    await app.backgroundTasks.idle()
    for (const run of late) t.equal(run(), undefined)
    t.match(await app.backgroundTasks.get(fails, id), { state: 'failed', attempt: 2, error: { message } })
    t.strictSame(found, late.length > 0 ? [] : Array(2).fill('ran beside 0'), `restore ${index}`)
  }
})

t.test('an attempt, or an onFailed, that has ended before restore calls run is not made any more', async t => {
  let runs: Array<() => unknown> = []
  let called: () => void
  const restored = async (times: number): Promise<void> => { while (runs.length < times) await new Promise<void>(resolve => { called = resolve }) }
  let end: () => void
  const ended = new Promise<void>(resolve => { end = resolve })
  const restore = async (_value: never, run: () => unknown): Promise<void> => {
    runs.push(run)
    called?.()
    await ended
  }
  const options = { context: { capture: () => 1, restore } }
  const add = async ({ app }: Awaited<ReturnType<typeof start>>, task: typeof note): Promise<string> => {
    runs = []
    app.get('/', async request => request.backgroundTasks.addTask(task, 'late').id)
    return (await app.inject('/')).body
  }
  const made: string[] = []
  const late = (options: object): typeof note => defineTask({ name: 'late', handler: async (what: string) => { made.push(what); return what }, ...options })

  const twice = late({ timeout: 20, retry: { attempts: 2, backoff: { delay: 1 } }, onFailed: () => { made.push('onFailed') } })
  const first = await start(t, { tasks: [twice], ...options })
  await add(first, twice)
  await restored(2)
  t.equal(runs[0]?.(), undefined, 'the second attempt runs')
  await restored(3)
  await first.app.backgroundTasks.idle()
  for (const run of runs) t.equal(run(), undefined, 'all are over')

  const cancelled = late({})
  const second = await start(t, { tasks: [cancelled], ...options })
  const id = await add(second, cancelled)
  await restored(1)
  t.ok(await second.app.backgroundTasks.cancel(cancelled, id))
  t.equal(runs[0]?.(), undefined, 'cancelled')

  const closed = late({})
  const third = await start(t, { tasks: [closed], closeTimeout: 10, ...options })
  await add(third, closed)
  await restored(1)
  await third.app.close()
  t.equal(runs[0]?.(), undefined, 'abandoned')

  const engine = new StubEngine()
  const fourth = await start(t, { tasks: [closed], closeTimeout: 10, engine, ...options })
  await fourth.app.ready()
  runs = []
  const verdict = engine.deliver({ task: 'late', payload: 'late', context: '1' })
  await restored(1)
  await fourth.app.close()
  t.match(await verdict, { kind: 'released' })
  t.equal(runs[0]?.(), undefined, 'released')
  // Nobody is told any more that run was not called.
  end!()
  await sleep(1)
  t.strictSame(made, [])
})

t.test('a lazy thenable that a handler returns is started once', async t => {
  for (const restore of [context.restore, async (_value: never, run: () => unknown) => await run()]) {
    let started = 0
    const query = defineTask({ name: 'query', handler: () => ({ then (resolve: (value: string) => void) { resolve(`row ${++started}`) } }) as unknown })
    const { app } = await start(t, { tasks: [query], context: { capture: () => null, restore } })
    app.get('/', async request => request.backgroundTasks.addTask(query, null).id)
    const { body: id } = await app.inject('/')
    await app.backgroundTasks.idle()
    t.match(await app.backgroundTasks.get(query, id), { state: 'succeeded', result: 'row 1' })
    t.equal(started, 1)
  }
})

t.test('the option may be an instance of a class: its functions are called on it, as they were at register', async t => {
  class Tenants {
    readonly #tenants = tenants
    header = 'x-tenant'
    capture (request: FastifyRequest): Tenant { return { id: String(request.headers[this.header]) } }
    restore (value: Tenant, run: () => unknown): unknown { return this.#tenants.run(value, run) }
  }
  const own = new Tenants()
  const bare = Object.assign(Object.create(null), context) as TaskContextOptions
  for (const option of [own, Object.freeze(Object.create(context)), bare] as TaskContextOptions[]) {
    found.length = 0
    const { app } = await start(t, { tasks: [note], context: option })
    Object.defineProperty(Tenants.prototype, 'restore', { value () { throw new Error('later') } })
    app.get('/', async request => { request.backgroundTasks.addTask(note, 'x') })
    await app.inject({ url: '/', headers: { 'x-tenant': 'a' } })
    await app.backgroundTasks.idle()
    t.strictSame(found, [['x', { id: 'a' }]])
  }
})

t.test('the option needs both functions, and a recording runs tasks with the value', async t => {
  const refused: Array<[context: unknown, message: RegExp]> = [
    [7, /^fastify-background-tasks: The option "context" of register accepts \{ capture, restore \}; received 7$/],
    [{ capture () {} }, /^fastify-background-tasks: .* accepts \{ capture, restore \}; "restore" is missing$/],
    [{ restore () {} }, /^fastify-background-tasks: .* "capture" is missing$/],
    [[], /"capture" is missing$/],
    [{ ...context, store () {} }, /^fastify-background-tasks: context has no option "store"/],
    [{ ...context, capture: 1 }, /^fastify-background-tasks: The option "capture" of context accepts a function; received 1$/],
    [new class { * capture (): Generator { yield 1 } restore (): void {} }(), /^fastify-background-tasks: The option "capture" of context accepts a function; received the function capture$/],
    [new class { capture (): void {} }(), /"restore" is missing$/]
  ]
  for (const [odd, message] of refused) {
    await t.rejects(start(t, { tasks: [note], context: odd } as FastifyBackgroundTasksOptions), { code: 'FST_BGT_INVALID_OPTION', message })
  }
  const { app } = await start(t, { tasks: [note], context })
  const tasks = recordTasks(app)
  app.get('/', async request => { request.backgroundTasks.addTask(note, 'recorded') })
  await app.inject({ url: '/', headers: { 'x-tenant': 'a' } })
  await tasks.run()
  t.strictSame(found, [['recorded', { id: 'a' }]])
})
