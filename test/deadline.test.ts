/** The deadline of `app.close()`: what it cuts off is booked once, leaves nothing running, and no reply promises it. */
import t from 'tap'
import { setImmediate as turn } from 'node:timers/promises'
import type { FastifyRequest } from 'fastify'
import { defineTask, type BackgroundTask, type FastifyBackgroundTasksOptions, type TaskCondition } from '../lib/index.js'
import { deferred, start, type Started } from './support/app.js'
import { watchFaults } from './support/faults.js'
import { StubEngine } from './support/stub-engine.js'

type Test = Parameters<typeof start>[0]
type List = FastifyRequest['backgroundTasks']

/** Keeps the process alive for a deadline that would not. */
function stayAlive (t: Test): void {
  const timer = setInterval(() => {}, 60_000)
  t.teardown(() => { clearInterval(timer) })
}

async function turns (n: number): Promise<void> {
  for (let i = 0; i < n; i++) await turn()
}

/** An app with one request in flight, over `inject()`: `close()` does not wait for those. */
async function inFlight (t: Test, options: FastifyBackgroundTasksOptions, enter: (list: List) => void, goOn: (list: List) => void = () => {}): Promise<Started & {
  reply: () => Promise<{ statusCode: number, json: () => { code?: string } }>, list: () => List
}> {
  stayAlive(t)
  const started = await start(t, options)
  const [entered, gate] = [deferred(), deferred()]
  let list: List | undefined
  started.app.get('/', async (request, reply) => {
    list = request.backgroundTasks
    enter(list)
    entered.resolve()
    await gate.promise
    goOn(list)
    return await reply.code(202).send({})
  })
  const injected = started.app.inject('/')
  await entered.promise
  return { ...started, list: () => list as List, reply: async () => { gate.resolve(); return await injected } }
}

t.test('a task that was cut off is slow for nobody, and never times out', async t => {
  stayAlive(t)
  const never = deferred()
  const failed: unknown[] = []
  const { app, logs } = await start(t, { closeTimeout: 0, timeout: 20, slowTask: 10, onError: error => { failed.push(error) } })
  await app.ready()
  const task = app.backgroundTasks.addTask(async () => { await never.promise })
  await turn()
  await app.close()
  // Timers fire in the order of their times: the task's would have, when this one does.
  await new Promise(resolve => { setTimeout(resolve, 40) })
  t.equal(task.state, 'abandoned')
  t.strictSame(failed, [])
  t.notOk(logs.some(line => line.msg.includes('is slow')))
  t.equal((task.signal.reason as Error).name, 'AbortError')
})

const again: Record<string, (list: List, tries: () => boolean) => () => unknown> = {
  synchronous: (list, tries) => function release () { if (tries()) list.addCleanup(release) },
  'asynchronous, before it waits': (list, tries) => async function release () { if (tries()) list.addCleanup(release); await turn() },
  'asynchronous, after it has waited': (list, tries) => async function release () { await turn(); if (tries()) list.addCleanup(release) },
  'failing each time': (list, tries) => function release () { if (tries()) list.addCleanup(release); throw new Error('x') },
  'two at a time': (list, tries) => function release () { if (tries()) { list.addCleanup(release); list.addCleanup(release) } }
}
for (const [name, make] of Object.entries(again)) {
  for (const waits of ['for a task', 'for its exchange', 'while it is cleaned up']) {
    t.test(`a cleanup that adds itself again ends at the deadline (${name}, ${waits})`, async t => {
      const faults = watchFaults(t)
      const never = deferred()
      let tried = 0
      const { app, reply } = await inFlight(t, { closeTimeout: 20 }, list => {
        if (waits === 'for a task') list.addTask(async () => { await never.promise })
        list.addCleanup(make(list, () => ++tried < 100_000))
      })
      if (waits !== 'for its exchange') {
        await reply()
        await turns(5)
      }
      await app.close()
      await turns(10)
      const sofar = tried
      await turns(10)
      t.equal(tried, sofar, `it has ended, at ${tried}`)
      t.ok(tried > 0 && tried < 100_000)
      t.match(app.backgroundTasks.stats, { pending: 0, running: 0 })
      t.strictSame(faults, [])
      if (waits === 'for its exchange') await reply()
      never.resolve()
    })
  }
}

for (const earlier of ['none', 'one that has ended', 'one that never ends']) {
  t.test(`a late cleanup by a handler in flight still runs (earlier cleanups: ${earlier})`, async t => {
    const never = deferred()
    const cleanups: string[] = []
    const { app, reply, logs } = await inFlight(t, { closeTimeout: 0 }, list => {
      list.addTask(() => {})
      if (earlier === 'one that has ended') list.addCleanup(() => { cleanups.push('early') })
      if (earlier === 'one that never ends') list.addCleanup(async () => { cleanups.push('early'); await never.promise })
    }, list => {
      list.addCleanup(() => { cleanups.push('late') })
      list.addCleanup(async () => { await turn(); cleanups.push('later') })
    })
    await app.close()
    await reply()
    await turns(10)
    t.strictSame(cleanups.filter(name => name !== 'early'), ['later', 'late'])
    t.notOk(logs.some(line => line.msg.includes('a cleanup added it')), 'nor is it said to be of a cleanup')
    never.resolve()
  })
}

const cancels: Record<string, (tasks: BackgroundTask[], list: List) => void> = {
  'of the task\'s signal': (tasks, _list) => { tasks[0]?.signal.addEventListener('abort', () => { for (const task of tasks) task.cancel() }) },
  'of the app\'s signal': (tasks, list) => { list.signal.addEventListener('abort', () => { for (const task of tasks) task.cancel() }) },
  'of another task\'s signal': (tasks, _list) => { tasks[1]?.signal.addEventListener('abort', () => { for (const task of tasks) task.cancel() }) }
}
for (const [name, listen] of Object.entries(cancels)) {
  for (const ended of [true, false]) {
    t.test(`cancel() from an abort listener ${name} counts once (${ended ? 'the list runs' : 'its exchange has not ended'})`, async t => {
      const [faults, never] = [watchFaults(t), deferred()]
      const job = defineTask({ name: 'job', handler () {} })
      const tasks: BackgroundTask[] = []
      const { app, reply, list } = await inFlight(t, { closeTimeout: 20, tasks: [job] }, list => {
        tasks.push(list.addTask(async () => { await never.promise }), list.addTask(() => {}), list.addTask(job), list.addTask(job, undefined, { delay: 10 }))
        listen(tasks, list)
      })
      if (ended) {
        await reply()
        await turns(5)
      }
      await app.close()
      const { pending, running, skipped, abandoned, succeeded } = app.backgroundTasks.stats
      t.strictSame({ pending, running, ended: skipped + abandoned + succeeded }, { pending: 0, running: 0, ended: 4 })
      t.equal(list().length, 0)
      t.strictSame(tasks.map(task => ['skipped', 'abandoned'].includes(task.state)), [true, true, true, true])
      t.equal(tasks[0]?.cancel(), false)
      never.resolve()
      if (!ended) await reply()
      await turns(5)
      t.match(app.backgroundTasks.stats, { pending: 0, running: 0, skipped, abandoned })
      t.strictSame(faults, [])
    })
  }
}

t.test('timeout bounds onError and onFailed: the next list takes the seat, and a late end is nothing', async t => {
  const [faults, gate] = [watchFaults(t), deferred()]
  const fail = (): never => { throw new Error('x') }
  const cases: Record<string, { options: FastifyBackgroundTasksOptions, add: (list: List) => void, hangs: number }> = {
    'onError, by the timeout of the app': { options: { timeout: 5, onError: async () => { await gate.promise } }, add: list => { list.addTask(fail) }, hangs: 1 },
    'onError, by the task\'s own': { options: { onError: async () => { await gate.promise } }, add: list => { list.with({ timeout: 5 }).addTask(fail) }, hangs: 1 },
    'onError of a task that has timed out': { options: { timeout: 5, onError: async () => { await gate.promise } }, add: list => { list.addTask(async () => { await gate.promise }) }, hangs: 1 },
    'onError of a `when` that threw': { options: { timeout: 5, onError: async () => { await gate.promise } }, add: list => { list.with({ when: fail }).addTask(() => {}) }, hangs: 1 },
    'onError that rejects when it is late': { options: { timeout: 5, onError: async () => { await gate.promise; fail() } }, add: list => { list.addTask(fail) }, hangs: 1 },
    'a lazy thenable of onError': { options: { timeout: 5, onError: () => ({ then () {} }) as unknown as Promise<void> }, add: list => { list.addTask(fail) }, hangs: 1 },
    'onFailed, by the timeout of its definition': { options: {}, add: list => { list.addTask(job) }, hangs: 1 },
    'onError, then onFailed': { options: { onError: async () => { await gate.promise } }, add: list => { list.addTask(job) }, hangs: 2 }
  }
  const job = defineTask({ name: 'job', timeout: 5, retry: { attempts: 1 }, handler: fail, onFailed: async () => { await gate.promise } })
  for (const [name, { options, add, hangs }] of Object.entries(cases)) {
    const { app, logs } = await start(t, { ...options, concurrency: 1, tasks: [job] })
    const ran: string[] = []
    app.get('/', async request => {
      add(request.backgroundTasks)
      request.backgroundTasks.addTask(() => { ran.push('next') })
      return 'ok'
    })
    await app.inject('/')
    app.backgroundTasks.addTask(() => { ran.push('other list') })
    await app.backgroundTasks.idle()
    t.strictSame(ran, ['next', 'other list'], name)
    t.match(app.backgroundTasks.stats, { failed: 1, succeeded: 2, pending: 0, running: 0 }, name)
    t.equal(logs.filter(line => /^on(Error|Failed) of a background task failed/.test(line.msg)).length, hangs, `${name}: it is said`)
  }
  gate.resolve()
  await turns(5)
  t.strictSame(faults, [])
})

const job = defineTask({ name: 'job', handler () {} })
for (const placement of ['without an engine', 'on an engine']) {
  const options = (engine = new StubEngine()): FastifyBackgroundTasksOptions => ({
    closeTimeout: 0, tasks: [job], ...placement === 'on an engine' ? { engine } : {}
  })
  t.test(`a definition added after the close, before its reply, is a 503 and never a 202 (${placement})`, async t => {
    const engine = new StubEngine()
    let task: BackgroundTask | undefined
    const { app, reply } = await inFlight(t, options(engine), () => {}, list => { task = list.addTask(job) })
    await app.close()
    const { statusCode, json } = await reply()
    t.equal(statusCode, 503)
    t.match(json(), { code: 'FST_BGT_CLOSED' })
    t.equal(task?.state, 'abandoned')
    t.strictSame(engine.stored, [])
    t.match(app.backgroundTasks.stats, { abandoned: 1, pending: 0 })
  })

  t.test(`so is one that was added before, and that the deadline has abandoned before its reply (${placement})`, async t => {
    const engine = new StubEngine()
    let task: BackgroundTask | undefined
    const { app, reply } = await inFlight(t, options(engine), list => { task = list.addTask(job) })
    await app.close()
    t.equal(task?.state, 'abandoned')
    const { statusCode, json } = await reply()
    t.equal(statusCode, 503)
    t.match(json(), { code: 'FST_BGT_CLOSED' })
    t.strictSame(engine.stored, [])
  })

  const never: Record<string, (list: List) => void> = {
    'was cancelled before': list => { list.addTask(job).cancel() },
    'is for a failure': list => { list.with({ when: 'error' }).addTask(job) },
    'is not wanted': list => { list.with({ when: () => false }).addTask(job) },
    'is a function': list => { list.addTask(() => {}) },
    'is a cleanup': list => { list.addCleanup(() => {}) }
  }
  for (const [name, add] of Object.entries(never)) {
    for (const when of ['before', 'after']) {
      // A task that comes after the close is abandoned, and cannot be cancelled.
      if (name === 'was cancelled before' && when === 'after') continue
      t.test(`a reply that does not promise it goes out: one added ${when} the close that ${name} (${placement})`, async t => {
        const nothing = (): void => {}
        const { app, reply } = await inFlight(t, options(), when === 'before' ? add : nothing, when === 'after' ? add : nothing)
        await app.close()
        t.equal((await reply()).statusCode, 202)
        t.match(app.backgroundTasks.stats, { pending: 0, running: 0 })
      })
    }
  }

  const promised: Record<string, TaskCondition> = { always: 'always', 'a function that says so': ({ failed }) => !failed, 'a function that throws': () => { throw new Error('when') } }
  for (const [name, when] of Object.entries(promised)) {
    t.test(`a definition whose \`when\` is ${name} is promised (${placement})`, async t => {
      const { app, reply } = await inFlight(t, options(), () => {}, list => { list.with({ when }).addTask(job) })
      await app.close()
      t.equal((await reply()).statusCode, 503)
    })
  }
}

const waits: Record<string, (app: Started['app']) => Promise<void>> = {
  'app.close()': async app => { await app.close() },
  'idle()': async app => { await app.backgroundTasks.idle() },
  'idle(), and goes on': async app => { await app.backgroundTasks.idle({ rejectOnFailure: true }); await app.backgroundTasks.idle() }
}
for (const [name, wait] of Object.entries(waits)) {
  for (const ofApp of [true, false]) {
    t.test(`a task ${ofApp ? 'of the app' : 'of a request'} that awaits ${name} waits for itself until closeTimeout, and the line of abandoned tasks says so`, async t => {
      stayAlive(t)
      const [faults, started] = [watchFaults(t), deferred()]
      const { app, logs } = await start(t, { closeTimeout: 100 })
      const task = async function shutdown (): Promise<void> { started.resolve(); await wait(app) }
      app.get('/', async request => {
        request.backgroundTasks.addTask(task)
        return 'ok'
      })
      await app.ready()
      const startedAt = performance.now()
      if (ofApp) app.backgroundTasks.addTask(task)
      else await app.inject('/')
      await started.promise
      await app.close()
      t.ok(performance.now() - startedAt > 90, 'not before')
      t.match(app.backgroundTasks.stats, { abandoned: 1, running: 0, pending: 0 })
      const lines = logs.filter(line => line.msg.startsWith('background tasks abandoned'))
      t.match(lines, [{ level: 50, tasks: [{ name: 'shutdown' }] }])
      t.match(lines[0]?.msg, /itself/, 'why')
      await turns(5)
      t.strictSame(faults, [])
    })
  }
}

t.test('the drain does not wait for what comes after its deadline, also if that is known only while it drains', { timeout: 20_000 }, async t => {
  stayAlive(t)
  const cases: Record<string, (app: Started['app']) => void> = {
    'a delay, added in the turn of the close': app => { app.backgroundTasks.addTask(flaky, undefined, { delay: 3_600_000 }) },
    'a backoff that begins in the drain': app => { app.backgroundTasks.addTask(flaky) }
  }
  const flaky = defineTask({ name: 'flaky', retry: { attempts: 2, backoff: { delay: 3_600_000, maxDelay: 3_600_000 } }, handler () { throw new Error('x') } })
  for (const [name, add] of Object.entries(cases)) {
    const { app, logs } = await start(t, { closeTimeout: 3_000, tasks: [flaky] })
    await app.ready()
    add(app)
    const startedAt = performance.now()
    await app.close()
    t.ok(performance.now() - startedAt < 2_000, name)
    t.match(logs.at(-1), { level: 50, msg: /abandoned.*: flaky/ }, name)
  }
})
