/** Definitions with a `file` run in a thread of the user's pool, in every placement. */
import { EventEmitter, once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { types } from 'node:util'
import { threadId } from 'node:worker_threads'
import { Piscina } from 'piscina'
import Fastify from 'fastify'
import t from 'tap'
import backgroundTasks, { declareTask, defineTask, type FastifyBackgroundTasksOptions, type TaskRecord, type ThreadPool } from '../lib/index.js'
import { recordTasks } from '../lib/testing.js'
import { collectLogs, start, type LogLine, type Started } from './support/app.js'
import { StubEngine } from './support/stub-engine.js'

const at = (name: string): URL => new URL(`support/threads/${name}`, import.meta.url)
interface Work { do?: string, ms?: number }
const work = defineTask<Work>({ name: 'work', file: at('work.js'), retry: { attempts: 1 } })

const FAILED_LATE = 'a thread failed while it ran no background task: a file may have thrown after its task had ended'
const errorsOf = ({ logs }: Pick<Started, 'logs'>): LogLine[] => logs.filter(({ level }) => level === 50)

/** An app whose pool ends with it. */
async function withThreads (t: Parameters<typeof start>[0], options: FastifyBackgroundTasksOptions = {}): Promise<Started & { pool: Piscina }> {
  const pool = new Piscina({ maxThreads: 2 })
  const started = await start(t, { tasks: [work], threads: pool, ...options })
  started.app.addHook('onClose', async () => { await pool.destroy() })
  return { ...started, pool }
}

async function ended ({ app }: Started, payload: Work, task = work): Promise<TaskRecord | undefined> {
  const { id } = await app.backgroundTasks.enqueue(task, payload)
  await app.backgroundTasks.idle()
  return await app.backgroundTasks.get(task, id)
}

t.test('a task with a file runs in another thread, and its record is that of any task', async t => {
  const started = await withThreads(t)
  started.app.post('/', async request => ({ id: request.backgroundTasks.addTask(work, {}).id }))
  const reply = await started.app.inject({ method: 'POST', url: '/', headers: { traceparent: '00-1-2-01' } })
  const { id } = reply.json<{ id: string }>()
  await started.app.backgroundTasks.idle()
  const record = await started.app.backgroundTasks.get(work, id)
  t.match(record, { id, state: 'succeeded', attempt: 1, result: { context: { id, attempt: 1, headers: { traceparent: '00-1-2-01' }, requestId: 'req-1' } } })
  t.not((record?.result as { threadId: number }).threadId, threadId)
  t.match(await ended(started, { do: 'undefined' }), { state: 'succeeded', result: null })
})

t.test('the event loop is free while a file computes, and a timeout ends it', async t => {
  const limited = defineTask<Work>({ name: 'limited', file: at('work.js'), retry: { attempts: 1 }, timeout: 300 })
  const started = await withThreads(t, { tasks: [work, limited] })
  let turns = 0
  const timer = setInterval(() => { turns++ }, 5)
  const record = await ended(started, { do: 'block', ms: 60_000 }, limited)
  clearInterval(timer)
  t.match(record, { state: 'failed', error: { code: 'FST_BGT_TIMEOUT' } })
  t.ok(turns > 5)
  while (started.pool.threads.length > 1 || started.pool.queueSize > 0) await sleep(5)
  t.match(await ended(started, {}), { state: 'succeeded' }, 'the pool goes on')
})

t.test('the deadline of a shutdown ends it', async t => {
  const { app, pool, logs } = await withThreads(t, { closeTimeout: 200 })
  await app.ready()
  app.backgroundTasks.addTask(work, { do: 'block', ms: 60_000 })
  while (pool.utilization === 0 && pool.queueSize === 0 && app.backgroundTasks.stats.running === 0) await sleep(5)
  await app.close()
  t.match(logs.find(({ level }) => level === 50), { msg: /^background tasks abandoned, because closeTimeout has passed.*: work$/ })
})

t.test('an error of a file has its name, message and code, and what is no JSON is not kept', async t => {
  const started = await withThreads(t)
  t.match(await ended(started, { do: 'throw' }), { state: 'failed', error: { name: 'RangeError', message: 'no', code: 'E_NO' } })
  const odd = await ended(started, { do: 'not JSON' })
  t.match(odd, { state: 'succeeded' })
  t.equal(odd?.result, undefined)
  t.match(started.logs.filter(({ level }) => level === 40), [{ msg: 'the result of a background task is not JSON: it is not kept', err: { message: /BigInt/ } }])
})

t.test('what a file throws reaches retry.when and onFailed as it would from a handler', async t => {
  const { default: throws, THROWN } = await import(at('throws.js').href) as { default: (payload: Work) => never, THROWN: object }
  const told: unknown[] = []
  const tell = (error: unknown): void => {
    const { name, message, code } = Object(error) as Record<string, unknown>
    told.push(types.isNativeError(error) || error instanceof Error ? { name, message, code } : { thrown: error })
  }
  const options = {
    name: 'throws',
    retry: { attempts: 2, when: (error: unknown) => { tell(error); return false } },
    onFailed (_payload: Work, error: unknown) { tell(error) }
  }
  const inThread = defineTask<Work>({ ...options, file: at('throws.js') })
  const inProcess = defineTask<Work>({ ...options, handler: throws })
  const [thread, here] = [await withThreads(t, { tasks: [inThread] }), await start(t, { tasks: [inProcess] })]
  for (const what of Object.keys(THROWN)) {
    const record = await ended(here, { do: what }, inProcess)
    const expected = told.splice(0)
    t.equal(expected.length, 2)
    t.match(await ended(thread, { do: what }, inThread), { state: 'failed', attempt: 1, error: record?.error }, what)
    t.strictSame(told.splice(0), expected, what)
  }
  for (const [what, type] of [['symbol', 'symbol'], ['function', 'function'], ['proxy', 'object']] as const) {
    await ended(thread, { do: what }, inThread)
    t.strictSame(told.splice(0), Array(2).fill({ name: 'Error', message: `a ${type} was thrown`, code: undefined }), `${what}, which cannot be cloned`)
  }
})

t.test('a file compiled to CommonJS runs; one that is missing, or exports no function, fails the attempt by name', async t => {
  const files: Array<[file: URL | string, record: object]> = [
    [at('compiled.cjs'), { state: 'succeeded', result: { compiled: {} } }],
    [fileURLToPath(at('work.js')), { state: 'succeeded' }],
    [at('work.js').href, { state: 'succeeded' }],
    // A URL of another realm, as jsdom has one.
    [{ [Symbol.toStringTag]: 'URL', toString: () => at('work.js').href } as never, { state: 'succeeded' }],
    [at('missing.js'), { state: 'failed', error: { message: /missing\.js, the file of the task "other", cannot be loaded/ } }],
    [at('none.js'), { state: 'failed', error: { name: 'TypeError', message: /^the default export of .*none\.js, the file of the task "other", is not a function$/ } }]
  ]
  for (const [file, record] of files) {
    const other = defineTask<Work>({ name: 'other', file, retry: { attempts: 1 } })
    t.match(await ended(await withThreads(t, { tasks: [other] }), {}, other), record, String(file))
  }
})

t.test('jobs of an engine run in threads, too, and a recording runs them', async t => {
  const engine = new StubEngine()
  const { app } = await withThreads(t, { engine })
  await app.ready()
  t.match(await engine.deliver({ task: 'work', id: 'a', payload: {}, attempt: 1 }), { kind: 'done', result: { context: { id: 'a' } } })
  t.match(await engine.deliver({ task: 'work', payload: { do: 'throw' } }), { kind: 'failed', error: { code: 'E_NO' } })
  const recorded = await withThreads(t)
  const tasks = recordTasks(recorded.app)
  const { id } = await recorded.app.backgroundTasks.enqueue(work, {})
  t.match(tasks.added, [{ name: 'work', payload: {} }])
  await tasks.run()
  t.match(await recorded.app.backgroundTasks.get(work, id), { state: 'succeeded' })
})

t.test('onFailed of a task with a file runs here, and threads that do not run the file are named', async t => {
  const told: unknown[] = []
  const failing = defineTask<Work>({ name: 'failing', file: at('work.js'), retry: { attempts: 2, backoff: { delay: 1 } }, onFailed (payload, error, { attempts }) { told.push(payload, (error as Error).name, attempts) } })
  await ended(await withThreads(t, { tasks: [failing] }), { do: 'throw' }, failing)
  t.strictSame(told, [{ do: 'throw' }, 'RangeError', 2])
  const others: Array<[run: ThreadPool['run'], message: RegExp]> = [
    [async () => undefined, /^the option "threads" has to run the file that it is given: its run resolved to undefined$/],
    [async () => ({ json: 7 }), /has to run the file/],
    [async () => { throw new Error('the pool is closed') }, /^the pool is closed$/],
    [() => { throw new Error('the pool throws') }, /^the pool throws$/]
  ]
  for (const [run, message] of others) {
    t.match(await ended(await start(t, { tasks: [work], threads: { run } }), {}), { state: 'failed', error: { message } })
  }
})

t.test('a file that throws after its task has ended is logged, and does not end the process', async t => {
  for (const atomics of ['async', 'disabled'] as const) {
    const pool = new Piscina({ minThreads: 1, maxThreads: 1, atomics })
    const started = await start(t, { tasks: [work], threads: pool })
    started.app.addHook('onClose', async () => { await pool.destroy() })
    t.match(await ended(started, { do: 'throw when told' }), { state: 'succeeded' })
    const thrown = once(pool, 'error')
    const channel = new BroadcastChannel('throw when told')
    channel.postMessage('now')
    await thrown
    channel.close()
    t.match(errorsOf(started), [{ msg: FAILED_LATE, err: { message: 'late' } }], atomics)
    t.match(await ended(started, {}), { state: 'succeeded' }, 'the pool goes on')
  }
})

t.test('an error of a pool is logged once by each app that has it, until the app has closed', async t => {
  const pool = Object.assign(new EventEmitter(), { run: async () => {} })
  const one = await start(t, { threads: pool })
  const { logger, logs } = collectLogs()
  const other = Fastify({ logger })
  for (let i = 0; i < 11; i++) await other.register(async child => { await child.register(backgroundTasks, { threads: pool }) })
  one.app.addHook('onClose', async () => { pool.emit('error', new Error('in the hook that closes the pool')) })
  pool.emit('error', new Error('first'))
  t.equal(pool.listenerCount('error'), 1, 'Node does not warn of the eleventh')
  await one.app.close()
  pool.emit('error', new Error('second'))
  await other.close()
  t.equal(pool.listenerCount('error'), 0)
  t.strictSame(errorsOf(one).map(({ err }) => err?.message), ['first', 'in the hook that closes the pool'])
  t.strictSame(errorsOf({ logs }).map(({ err }) => err?.message), ['first', 'in the hook that closes the pool', 'second'])
})

t.test('a pool that is no event emitter, or only half of one, is taken as it is', async t => {
  const run = async (): Promise<void> => {}
  const pools = [
    { run, on: 'on', off: 'off' },
    { run, on () { throw new Error('on') }, off () { throw new Error('off') } },
    { run, get on () { throw new Error('get on') }, get off () { throw new Error('get off') } }
  ]
  for (const threads of pools) {
    const started = await start(t, { threads } as never)
    await started.app.close()
    t.strictSame(errorsOf(started), [])
  }
})

t.test('bad input is refused, by the definition or at register', async t => {
  const define = (options: object): unknown => defineTask({ name: 'odd', ...options } as never)
  const refused: Array<[options: object, message: RegExp]> = [
    [{}, /^defineTask needs the option either "handler" or "file"; received name$/],
    [{ file: at('work.js'), handler () {} }, /either "handler" or "file"; received name, file, handler$/],
    [{ file: './work.js' }, /^The option "file" of defineTask accepts an absolute file: URL or path; received '\.\/work\.js'$/],
    [{ file: new URL('https://example.com/work.js') }, /"file" of defineTask accepts/],
    ...[7, '', 'file:work.js', 'file:../work.js', 'file://host/work.js', 'file:///a%2Fb.js', { toString: () => at('work.js').href }, [at('work.js').href], Object(fileURLToPath(at('work.js'))), new Proxy(at('work.js'), {})]
      .map((file): [options: object, message: RegExp] => [{ file }, /"file" of defineTask accepts/])
  ]
  for (const [options, message] of refused) t.throws(() => define(options), { code: 'FST_BGT_INVALID_OPTION', message })
  const needsThreads = { code: 'FST_BGT_INVALID_OPTION', message: /^fastify-background-tasks: The task "work" has a file, which runs in a thread: pass a pool as the option "threads" of register/ }
  await t.rejects(start(t, { tasks: [work] }), needsThreads)
  await t.rejects(start(t, { tasks: [work], engine: new StubEngine() }), needsThreads)
  await t.rejects(start(t, { tasks: [work], engine: new StubEngine(), worker: false, fallback: 'local' }), needsThreads)
  await start(t, { tasks: [work], engine: new StubEngine(), worker: false })
  await t.rejects(start(t, { tasks: [work], threads: {} as never }), { code: 'FST_BGT_INVALID_OPTION', message: /"threads" of register accepts a pool of threads with a method run/ })
})

t.test('a declaration is added and stored like a definition, and what its handledBy returns is the same task', async t => {
  const resize = declareTask<{ path: string }>({ name: 'resize', payload: { type: 'object', required: ['path'] }, retry: { attempts: 1 }, timeout: 5_000 })
  const engine = new StubEngine()
  const web = await start(t, { tasks: [resize], engine })
  web.app.post('/', async request => ({ id: request.backgroundTasks.addTask(resize, { path: 'a' }).id }))
  t.equal((await web.app.inject({ method: 'POST', url: '/' })).statusCode, 200)
  t.match(engine.stored, [[{ task: 'resize', payload: { path: 'a' } }]])
  t.match(engine.specs, [{ name: 'resize', attempts: 1, timeout: 5_000, concurrency: 0 }])
  t.strictSame(engine.calls, ['start', 'enqueue'], 'and nothing is consumed')
  t.throws(() => web.app.backgroundTasks.addTask(resize, {} as never), { code: 'FST_BGT_INVALID_PAYLOAD' })

  const ran: unknown[] = []
  const handled = resize.handledBy(payload => { ran.push(payload) }, { onFailed () {} })
  const other = new StubEngine()
  const worker = await start(t, { tasks: [handled, work], engine: other, threads: { run: async () => {} } })
  await worker.app.ready()
  await other.deliver({ task: 'resize', payload: { path: 'b' } })
  t.strictSame(ran, [{ path: 'b' }])
  t.match(other.specs, [{ name: 'resize', attempts: 1, timeout: 5_000, concurrency: 10 }, { name: 'work' }])
  for (const [{ app }, added] of [[web, handled], [worker, resize]] as const) {
    const { id } = await app.backgroundTasks.enqueue(added, { path: 'c' })
    t.match(await app.backgroundTasks.get(added, id), { id, name: 'resize' }, 'either works where the other is registered')
  }
  const threaded = await withThreads(t, { tasks: [declareTask<Work>({ name: 'threaded' }).handledBy(at('work.js'))] })
  t.equal(threaded.app.backgroundTasks.length, 0)
})

t.test('a declaration is refused where it would have to run, twice, and with a handler', async t => {
  const resize = declareTask<object>({ name: 'resize' })
  const nothingToRun = { code: 'FST_BGT_INVALID_OPTION', message: /^fastify-background-tasks: The option "tasks" of register has the declaration "resize", which has nothing to run.*handledBy/ }
  await t.rejects(start(t, { tasks: [resize] }), nothingToRun)
  await t.rejects(start(t, { tasks: [resize], engine: new StubEngine(), fallback: 'local' }), nothingToRun)
  await t.rejects(start(t, { tasks: [resize, resize.handledBy(() => {})] }), { code: 'FST_BGT_DUPLICATE_TASK' })
  t.throws(() => declareTask({ name: 'a', handler () {} } as never), { code: 'FST_BGT_INVALID_OPTION', message: /^declareTask has no option "handler"/ })
  t.equal(declareTask.withTypeProvider()({ name: 'a', payload: {} }).name, 'a')
  t.throws(() => declareTask({} as never), { code: 'FST_BGT_INVALID_OPTION', message: /^declareTask needs the option "name"; received none$/ })
  for (const bad of [undefined, null, 7, './relative.js', function * () {}]) t.throws(() => resize.handledBy(bad as never), { code: 'FST_BGT_INVALID_OPTION' }, String(bad))
  t.throws(() => resize.handledBy(() => {}, { onFail () {} } as never), { code: 'FST_BGT_INVALID_OPTION', message: /handledBy of the task "resize" has no option "onFail"/ })
})

t.test('a recording has the tasks of a declaration, and cannot run them', async t => {
  const resize = declareTask<{ path: string }>({ name: 'resize', retry: { attempts: 5 } })
  const { app } = await start(t, { tasks: [resize], engine: new StubEngine() })
  const tasks = recordTasks(app)
  await app.backgroundTasks.enqueue(resize, { path: 'a' })
  t.match(tasks.added, [{ name: 'resize', payload: { path: 'a' } }])
  await t.rejects(tasks.run(), { code: 'FST_BGT_INVALID_OPTION', message: /^The task "resize" is only declared in this process/ })
  t.equal(app.backgroundTasks.stats.failed, 1)
})

t.test('a recording has the tasks of a file in an app without threads, and says that it needs them to run', async t => {
  let told = 0
  const file = defineTask<Work>({ name: 'file', file: at('work.js'), onFailed () { told++ } })
  const { app } = await start(t, { tasks: [file], engine: new StubEngine(), worker: false })
  const tasks = recordTasks(app)
  await app.backgroundTasks.enqueue(file, {})
  t.match(tasks.added, [{ name: 'file', payload: {} }])
  await t.rejects(tasks.run(), { code: 'FST_BGT_INVALID_OPTION', message: 'The task "file" has a file, and this app has no threads: with a pool as the option "threads" of register it can run' })
  t.equal(app.backgroundTasks.stats.failed, 1)
  t.equal(told, 0)
})
