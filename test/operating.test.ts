/** Operating tasks of definitions: what holds beside the conformance of each placement, on an engine that does as it is told. */
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { setTimeout as sleep } from 'node:timers/promises'
import t from 'tap'
import { defineTask, type AnyTaskDefinition, type FastifyBackgroundTasksOptions, type JobRecord, type TaskAddedMessage, type TaskEngine, type TaskSkippedMessage } from '../lib/index.js'
import { deferred, start, type Started } from './support/app.js'
import { StubEngine } from './support/stub-engine.js'

const ID = '00000000-0000-4000-8000-000000000001'
const job = defineTask({ name: 'job', handler () {} })

async function until (isSo: () => boolean): Promise<void> {
  while (!isSo()) await sleep(2)
}

/** An engine that can do everything, as far as the core can tell. */
class Able extends StubEngine {
  override readonly supports = { delay: true, key: true, tx: true, get: true, count: true, find: true, retry: true, cancel: true }
  readonly watches: string[] = []
  record: JobRecord | undefined
  count: NonNullable<TaskEngine['count']> = async () => ({ pending: 1, failed: 2 })
  find: NonNullable<TaskEngine['find']> = async () => []
  retry: NonNullable<TaskEngine['retry']> = async () => true
  cancel: NonNullable<TaskEngine['cancel']> = async () => true
  watch: NonNullable<TaskEngine['watch']> = async task => {
    this.watches.push(task)
    return () => { this.watches.push(`no ${task}`) }
  }

  override async get (): Promise<JobRecord | undefined> {
    this.calls.push('get')
    return this.record
  }
}

async function onEngine (t: Parameters<typeof start>[0], tasks: readonly AnyTaskDefinition[], options: FastifyBackgroundTasksOptions = {}, engine = new Able()): Promise<Started & { engine: Able }> {
  const started = await start(t, { tasks, engine, enqueueTimeout: 100, ...options })
  await started.app.ready()
  return { ...started, engine }
}

const recordOf = (state: JobRecord['state']): JobRecord => ({ id: ID, name: 'job', state, attempt: 1, enqueuedAt: new Date(0).toISOString() })

t.test('an engine that says that it supports what it has no method for is refused', async t => {
  for (const method of ['count', 'find', 'retry', 'cancel'] as const) {
    const engine = Object.assign(new Able(), { [method]: undefined })
    await t.rejects(start(t, { engine: engine as TaskEngine, tasks: [job] }), { code: 'FST_BGT_INVALID_OPTION', message: `fastify-background-tasks: The engine "stub" says that it supports "${method}", and has no such method` })
  }
})

t.test('a job that an engine has delivered ends when the engine says that it was cancelled, wherever it is', async t => {
  const gate = deferred()
  const aborts: unknown[] = []
  let failures = 0
  const long = defineTask({
    name: 'long',
    retry: { attempts: 3 },
    async handler (_: undefined, { signal }) {
      signal.addEventListener('abort', () => { aborts.push(signal.reason) })
      await gate.promise
      throw new Error('too late')
    },
    onFailed () { failures++ }
  })
  const { app, engine, logs } = await onEngine(t, [long, job], { concurrency: 1 })
  const running = engine.deliver({ task: 'long', id: 'running' })
  const waiting = engine.deliver({ task: 'long', id: 'waiting' })
  const next = engine.deliver({ task: 'job', id: 'next' })
  await until(() => app.backgroundTasks.stats.running === 1)
  for (const [task, id] of [['long', 'nobody'], ['job', 'running'], ['', ''], ['long', 'waiting'], ['long', 'running'], ['long', 'running']] as const) engine.cancelled?.(task, id)
  t.strictSame(await Promise.all([running, waiting]), [{ kind: 'cancelled' }, { kind: 'cancelled' }])
  t.match(await next, { kind: 'done' }, 'a handler that never ends frees its seat')
  t.match(aborts, [{ code: 'FST_BGT_CANCELLED', message: 'The background task "long" was cancelled' }])
  gate.resolve()
  await until(() => logs.some(({ msg }) => msg.includes('ended after it was cut off')))
  t.match(app.backgroundTasks.stats, { pending: 0, running: 0, succeeded: 1, skipped: 2, failed: 0 })
  t.equal(failures, 0)
  engine.cancelled?.('long', 'running')
  await app.close()
})

t.test('a job may cancel itself before its function has returned', async t => {
  const itself = defineTask({
    name: 'itself',
    async handler (_: undefined, { id }) {
      engine.cancelled?.('itself', id)
      await new Promise(() => {})
    }
  })
  const tooLate = defineTask({ name: 'too-late', handler (_: undefined, { id }) { engine.cancelled?.('too-late', id) } })
  const { app, engine, logs } = await onEngine(t, [itself, tooLate])
  t.strictSame(await engine.deliver({ task: 'itself' }), { kind: 'cancelled' })
  t.match(await engine.deliver({ task: 'too-late' }), { kind: 'done' }, 'a synchronous function has ended by then')
  t.match(app.backgroundTasks.stats, { pending: 0, running: 0, succeeded: 1, skipped: 1 })
  t.notOk(logs.some(({ level }) => level >= 40))
})

t.test('an engine gets a verdict for a task that somebody else has cancelled before its start', async t => {
  const cancelling = (message: unknown): void => { (message as TaskAddedMessage).task.cancel() }
  subscribe('fastify-background-tasks.added', cancelling)
  t.teardown(() => unsubscribe('fastify-background-tasks.added', cancelling))
  const { engine } = await onEngine(t, [job])
  t.strictSame(await engine.deliver({ task: 'job' }), { kind: 'cancelled' })
})

t.test('a hundred waits for results are one subscription, which ends with the app', async t => {
  const { app, engine } = await onEngine(t, [job])
  let tell: (ids: readonly string[]) => void = () => {}
  engine.watch = async (task, onEnd) => {
    engine.watches.push(task)
    tell = onEnd
    return () => { engine.watches.push(`no ${task}`) }
  }
  engine.record = recordOf('running')
  const waits = Array.from({ length: 100 }, async () => await app.backgroundTasks.result(job, ID, { timeout: 10_000 }))
  await until(() => engine.watches.length > 0)
  engine.record = recordOf('succeeded')
  tell(['another', ID])
  t.ok((await Promise.all(waits)).every(record => record?.state === 'succeeded'))
  t.strictSame(engine.watches, ['job'])
  await app.close()
  t.strictSame(engine.watches, ['job', 'no job'])
})

t.test('a result comes from looks where nobody tells of ends, or where not all are told', async t => {
  for (const watch of [undefined, async () => { throw new Error('no channel') }, () => { throw new Error('no method') }, async () => () => { throw new Error('no end') }, () => new Promise<never>(() => {})]) {
    const { app, engine } = await onEngine(t, [job], {}, Object.assign(new Able(), { watch }) as Able)
    engine.record = recordOf('running')
    const wait = app.backgroundTasks.result(job, ID, { timeout: 10_000 })
    setTimeout(() => { engine.record = recordOf('failed') }, 30)
    t.match(await wait, { state: 'failed' }, String(watch))
    await app.close()
  }
})

t.test('results that come and go during a look are looked at no more often than one', async t => {
  const { app, engine } = await onEngine(t, [job], {}, Object.assign(new Able(), { watch: undefined }) as never)
  const idOf = (i: number): string => ID.slice(0, -2) + String(i).padStart(2, '0')
  const asked = new Map<string, number>()
  const looksAt = (id: string): number => asked.get(id) ?? 0
  const last = idOf(99)
  let answer: (() => void) | undefined
  const get: TaskEngine['get'] = async (_, id) => {
    asked.set(id, looksAt(id) + 1)
    // The first two looks are those with which each wait begins.
    if (id !== last && looksAt(id) > 2) await new Promise<void>(resolve => { answer = resolve })
    return { ...recordOf('running'), id }
  }
  Object.assign(engine, { get })
  let wait: Promise<unknown> = Promise.resolve()
  for (let i = 0; i < 10; i++) {
    await wait
    answer = undefined
    const first = app.backgroundTasks.result(job, idOf(i), { timeout: 150 })
    await until(() => answer !== undefined)
    await first
    const before = looksAt(last)
    wait = app.backgroundTasks.result(job, last, { timeout: i < 9 ? 20 : 10_000 })
    await until(() => looksAt(last) >= before + 2)
    ;(answer as unknown as () => void)()
  }
  const before = looksAt(last)
  // One look each 100 ms, where ten at once would be more than thirty.
  await sleep(350)
  t.ok(looksAt(last) - before <= 6, `looked ${looksAt(last) - before} times`)
  await app.close()
  t.equal(await wait, undefined)
})

t.test('what answers after the last wait has ended, or after the app has closed, leaves nothing behind', async t => {
  const { app, engine } = await onEngine(t, [job])
  const subscribed = deferred()
  engine.watch = async task => {
    engine.watches.push(task)
    await subscribed.promise
    return () => { engine.watches.push(`no ${task}`) }
  }
  engine.record = recordOf('running')
  const answered = deferred()
  let looks = 0
  engine.get = async () => {
    if (++looks > 1) await answered.promise
    return engine.record
  }
  const wait = app.backgroundTasks.result(job, ID, { timeout: 150 })
  await until(() => looks > 1)
  t.equal(await wait, undefined)
  engine.record = recordOf('succeeded')
  answered.resolve()
  await sleep(1)
  const seen = looks
  await app.close()
  subscribed.resolve()
  await until(() => engine.watches.length === 2)
  t.strictSame(engine.watches, ['job', 'no job'])
  t.equal(looks, seen)
})

t.test('a result that is gone meanwhile, or an engine that is away for a moment, does not fail the wait', async t => {
  const { app, engine } = await onEngine(t, [job], {}, Object.assign(new Able(), { watch: undefined }) as never)
  engine.record = recordOf('running')
  const gone = app.backgroundTasks.result(job, ID, { timeout: 10_000 })
  setTimeout(() => { engine.record = undefined }, 20)
  t.equal(await gone, undefined)
  engine.record = recordOf('running')
  const away = app.backgroundTasks.result(job, ID, { timeout: 10_000 })
  await until(() => engine.calls.filter(call => call === 'get').length > 3)
  let looks = 0
  engine.get = async () => {
    if (looks++ < 2) throw new Error('connection lost')
    return recordOf('succeeded')
  }
  t.match(await away, { state: 'succeeded' })
})

t.test('a request that asks for a result while the app closes does not hold up the close', async t => {
  const closing = deferred()
  const asked = deferred()
  const engine = new Able()
  const { app, get } = await start(t, { tasks: [job], engine })
  app.get('/', async () => {
    asked.resolve()
    await closing.promise
    engine.record = recordOf('running')
    return { hasEnded: await app.backgroundTasks.result(job, ID, { timeout: 60_000 }) !== undefined }
  })
  app.addHook('preClose', async () => { closing.resolve() })
  const reply = get('/')
  await asked.promise
  await app.close()
  t.equal(await reply, '{"hasEnded":false}')
})

t.test('an engine that cannot do it, is away, hangs or answers nonsense costs its own call only', async t => {
  const unable = await start(t, { tasks: [job], engine: new StubEngine() })
  for (const call of [(): Promise<unknown> => unable.app.backgroundTasks.count(job), () => unable.app.backgroundTasks.find(job, { state: 'failed' }), () => unable.app.backgroundTasks.retry(job, ID), () => unable.app.backgroundTasks.cancel(job, ID)]) {
    await t.rejects(call(), { code: 'FST_BGT_UNSUPPORTED', message: /^stub does not support "\w+", which was asked for the task "job"; it supports delay, key, tx, get$/ })
  }
  const { app, engine } = await onEngine(t, [job])
  const tasks = app.backgroundTasks
  const away = { code: 'FST_BGT_ENGINE_UNAVAILABLE', statusCode: 503, headers: { 'retry-after': '1' } }
  for (const fault of [async () => { throw new Error('gone') }, () => { throw new Error('gone') }, () => new Promise<never>(() => {})]) {
    Object.assign(engine, { count: fault, find: fault, retry: fault, cancel: fault, get: fault })
    for (const call of [(): Promise<unknown> => tasks.count(job), () => tasks.find(job, { state: 'failed' }), () => tasks.retry(job, ID), () => tasks.cancel(job, ID), () => tasks.result(job, ID, { timeout: 0 })]) await t.rejects(call(), away)
  }
  Object.assign(engine, { retry: async () => 'yes', cancel: async () => undefined, find: async () => undefined })
  t.equal(await tasks.retry(job, ID), false)
  t.equal(await tasks.cancel(job, ID), false)
  t.strictSame(await tasks.find(job, { state: 'failed' }), { records: [] })
})

t.test('health tells what the log tells, and never throws', async t => {
  const engine = new Able()
  const { app } = await start(t, { tasks: [job], engine, enqueueTimeout: 20 })
  engine.onStart = async () => { throw new Error('connect ECONNREFUSED 127.0.0.1:1') }
  t.match(app.backgroundTasks.health(), { engine: 'stub', connected: false, consuming: [], error: 'it has not been reached yet' })
  await app.ready()
  t.strictSame(app.backgroundTasks.health(), { engine: 'stub', connected: false, consuming: [], error: 'connect ECONNREFUSED 127.0.0.1:1' })
  engine.onStart = async () => {}
  await until(() => app.backgroundTasks.health().consuming.length > 0)
  t.strictSame(app.backgroundTasks.health(), { engine: 'stub', connected: true, consuming: ['job'] })
  engine.report?.(new Error('the line is down'))
  let isConnected: unknown = false
  Object.defineProperty(engine, 'isConnected', { get: () => { if (isConnected === 'throws') throw new Error('no'); return isConnected } })
  t.match(app.backgroundTasks.health(), { connected: false, error: 'the line is down' })
  isConnected = 'throws'
  t.match(app.backgroundTasks.health(), { connected: false })
  isConnected = true
  t.match(app.backgroundTasks.health(), { connected: true })
  await app.close()
  t.strictSame(app.backgroundTasks.health(), { engine: 'stub', connected: false, consuming: [], error: 'the app is closed' })
})

t.test('a task of a request that is cancelled while it runs lets the rest of its list go on', async t => {
  const reasons: string[] = []
  const skipped = (message: unknown): void => { reasons.push((message as TaskSkippedMessage).reason) }
  subscribe('fastify-background-tasks.skipped', skipped)
  t.teardown(() => unsubscribe('fastify-background-tasks.skipped', skipped))
  const ran: string[] = []
  const hangs = defineTask({ name: 'hangs', timeout: 60_000, async handler () { ran.push('hangs'); await new Promise(() => {}) } })
  const { app } = await start(t, { tasks: [hangs], slowTask: 60_000 })
  app.get('/', async request => {
    const { id } = request.backgroundTasks.addTask(hangs)
    request.backgroundTasks.addTask(() => { ran.push('next') })
    request.backgroundTasks.addCleanup(() => { ran.push('cleanup') })
    return { id }
  })
  const { id } = (await app.inject('/')).json<{ id: string }>()
  await until(() => ran.length > 0)
  t.equal(await app.backgroundTasks.cancel(hangs, id), true)
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['hangs', 'next', 'cleanup'])
  t.strictSame(reasons, ['it was cancelled'])
  t.match(app.backgroundTasks.stats, { succeeded: 1, skipped: 1, running: 0, pending: 0 })
})

t.test('a task of this process may cancel itself before its function has returned', async t => {
  const answers: Array<Promise<boolean>> = []
  const spans: string[] = []
  const itself: AnyTaskDefinition = defineTask({
    name: 'itself',
    async handler (_: undefined, { app, id }) {
      answers.push(app.backgroundTasks.cancel(itself as never, id))
      spans.push('starts')
      await sleep(5)
      spans.push('goes on')
    }
  })
  const atOnce: AnyTaskDefinition = defineTask({ name: 'at-once', handler (_: undefined, { app, id }) { answers.push(app.backgroundTasks.cancel(atOnce as never, id)) } })
  const { app, logs } = await start(t, { tasks: [itself, atOnce] })
  app.get('/', async request => {
    request.backgroundTasks.addTask(itself as never)
    request.backgroundTasks.addTask(async () => { spans.push('next starts'); await sleep(20); spans.push('next ends') })
    request.backgroundTasks.addTask(() => { spans.push('last') })
    request.backgroundTasks.addTask(atOnce as never)
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(await Promise.all(answers), [true, false], 'a synchronous function has ended by then')
  t.strictSame(spans, ['starts', 'next starts', 'goes on', 'next ends', 'last'], 'one task of the list runs at a time')
  t.match(app.backgroundTasks.stats, { pending: 0, running: 0, succeeded: 3, skipped: 1 })
  t.notOk(logs.some(({ level }) => level >= 40))
})

t.test('a retry that finds maxPending tasks is refused, and the task can be retried later', async t => {
  const gate = deferred()
  let fails = true
  const doomed = defineTask({ name: 'doomed', retry: { attempts: 1 }, handler () { if (fails) throw new Error('no') } })
  const { app } = await start(t, { tasks: [doomed], maxPending: 1 })
  const { id } = await app.backgroundTasks.enqueue(doomed)
  await app.backgroundTasks.idle()
  app.backgroundTasks.addTask(() => gate.promise)
  await t.rejects(app.backgroundTasks.retry(doomed, id), { code: 'FST_BGT_OVERLOADED' })
  t.match(await app.backgroundTasks.get(doomed, id), { state: 'failed' })
  gate.resolve()
  await app.backgroundTasks.idle()
  fails = false
  t.equal(await app.backgroundTasks.retry(doomed, id), true)
  t.match(await app.backgroundTasks.result(doomed, id, { timeout: 5_000 }), { state: 'succeeded', attempt: 1 })
})
