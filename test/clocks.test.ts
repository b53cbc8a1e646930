/** Time: delays and ages are those of a monotonic clock, may be of any length, and tests may put clocks of their own in its place. */
import t from 'tap'
import { mock } from 'node:test'
import { setImmediate as turn } from 'node:timers/promises'
import { defineTask, type BackgroundTask } from '../lib/index.js'
import { deferred, start } from './support/app.js'
import { ownClock } from './support/clock.js'
import { watchFaults, watchWarnings } from './support/faults.js'
import { StubEngine } from './support/stub-engine.js'

type Test = Parameters<typeof start>[0]

const { now } = Date
const HOUR = 3_600_000
/** More than Node's timers take: they would fire after a millisecond. */
const LONG = 2 ** 31 + 5

/** What somebody sets the machine's clock to, or a test the process's. */
const clocks: Record<string, (at: number) => number> = {
  'set back': () => now() - HOUR,
  'set forward': () => now() + HOUR,
  frozen: at => at,
  'that says nothing': () => NaN,
  'running backwards': at => 2 * at - now()
}

function setClock (t: Test, read: (at: number) => number): void {
  const at = now()
  Date.now = () => read(at)
  t.teardown(() => { Date.now = now })
}

/** Real timers, whatever a test has put in their place. */
const { setTimeout } = globalThis
const pass = async (ms: number): Promise<void> => { await new Promise(resolve => { setTimeout(resolve, ms) }) }

for (const [name, read] of Object.entries(clocks)) {
  for (const when of ['before the task is added', 'while it waits']) {
    t.test(`a clock ${name} ${when} changes no delay and no backoff`, async t => {
      const starts: Record<string, number[]> = { delayed: [], flaky: [], late: [] }
      const started = (name: string): void => { starts[name]?.push(performance.now()) }
      const delayed = defineTask({ name: 'delayed', handler () { started('delayed') } })
      const late = defineTask({ name: 'late', handler () { started('late') } })
      const flaky = defineTask({ name: 'flaky', retry: { attempts: 2, backoff: { delay: 60 } }, handler () { started('flaky'); throw new Error('x') } })
      const { app } = await start(t, { tasks: [delayed, flaky, late] })
      await app.ready()
      if (when === 'before the task is added') setClock(t, read)
      const addedAt = performance.now()
      app.backgroundTasks.addTask(delayed, undefined, { delay: 60 })
      app.backgroundTasks.addTask(flaky)
      const tomorrow = app.backgroundTasks.addTask(late, undefined, { delay: HOUR / 2 })
      while (starts.flaky?.length === 0) await turn()
      if (when === 'while it waits') setClock(t, read)
      while (app.backgroundTasks.length > 1) await turn()
      const [first = 0, second = 0] = starts.flaky ?? []
      const waits = { delay: (starts.delayed?.[0] ?? 0) - addedAt, backoff: second - first }
      for (const [what, ms] of Object.entries(waits)) t.ok(ms > 58 && ms < 10_000, `${what}: ${ms.toFixed()} ms`)
      t.strictSame(starts.late, [])
      const { oldestPendingMs } = app.backgroundTasks.stats
      t.ok(oldestPendingMs > 58 && oldestPendingMs < 10_000, `its age: ${oldestPendingMs.toFixed()} ms`)
      t.equal(tomorrow.cancel(), true)
      Date.now = now
    })
  }

  t.test(`a clock ${name} changes no age, and lets no record go`, async t => {
    const ages: unknown[] = []
    const job = defineTask({ name: 'job', keep: { succeeded: 60 }, handler () {} })
    const never = deferred()
    const { app, logs } = await start(t, { tasks: [job], closeTimeout: 0 })
    await app.ready()
    const { id } = app.backgroundTasks.addTask(job)
    await app.backgroundTasks.idle()
    app.backgroundTasks.addTask(async () => { await never.promise })
    await turn()
    if (name !== 'that says nothing') setClock(t, read)
    app.backgroundTasks.addTask(job, undefined, { delay: HOUR })
    t.match(await app.backgroundTasks.get(job, id), { state: 'succeeded' })
    await app.close()
    Date.now = now
    for (const line of logs) if (line.msg.startsWith('background tasks abandoned')) ages.push(...(line.tasks as Array<{ ageMs: number }>).map(({ ageMs }) => ageMs >= 0 && ageMs < 10_000))
    t.strictSame(ages, [true, true])
    never.resolve()
  })
}

t.test('an engine is told how long a job waits, whatever the clock says', async t => {
  const engine = new StubEngine()
  const job = defineTask({ name: 'job', handler () {} })
  const { app } = await start(t, { tasks: [job], engine })
  app.get('/', async request => {
    request.backgroundTasks.addTask(job, undefined, { delay: HOUR })
    setClock(t, clocks['set forward'] as () => number)
    return 'ok'
  })
  await app.inject('/')
  Date.now = now
  await app.backgroundTasks.idle()
  const [stored] = engine.stored[0] ?? []
  t.ok(stored !== undefined && stored.delayMs > HOUR - 10_000 && stored.delayMs <= HOUR, String(stored?.delayMs))
})

/** The waits that are asked of Node's timers. */
function watchTimers (t: Test): number[] {
  const waits: number[] = []
  const real = globalThis.setTimeout
  globalThis.setTimeout = Object.assign(((fn: (...args: unknown[]) => void, ms = 0, ...args: unknown[]) => {
    waits.push(ms)
    return real(() => { fn(...args) }, ms)
  }) as typeof real, real)
  t.teardown(() => { globalThis.setTimeout = real })
  return waits
}

t.test('what is longer than Node\'s timers is accepted everywhere, and nothing fires early', async t => {
  const [warnings, faults, waits] = [watchWarnings(t), watchFaults(t), watchTimers(t)]
  const engine = new StubEngine()
  const gate = deferred()
  const attempts: string[] = []
  const backoff = { type: 'fixed', delay: LONG, maxDelay: 2 * LONG } as const
  const job = defineTask({ name: 'job', handler () { attempts.push('job') } })
  const flaky = defineTask({ name: 'flaky', retry: { attempts: 2, backoff }, keep: { succeeded: LONG, failed: LONG }, timeout: LONG, handler () { attempts.push('flaky'); throw new Error('x') } })
  const soon = defineTask({ name: 'soon', keep: { succeeded: LONG }, handler () { attempts.push('soon') } })
  const limits = { timeout: LONG, slowTask: LONG, closeTimeout: LONG }
  const { app, logs } = await start(t, { ...limits, tasks: [job, flaky, soon], onError: async () => { await turn() } })
  const stored = await start(t, { ...limits, tasks: [job], engine })
  await app.ready()
  const tasks: BackgroundTask[] = [app.backgroundTasks.addTask(job, undefined, { delay: LONG }), app.backgroundTasks.addTask(job, undefined, { delay: Number.MAX_SAFE_INTEGER }), app.backgroundTasks.addTask(flaky)]
  const waiting = app.backgroundTasks.addTask(async () => { await gate.promise })
  app.backgroundTasks.addTask(soon, undefined, { delay: 30 })
  // It is added last, and is due long before the others.
  while (!attempts.includes('soon')) await turn()
  await pass(10)
  t.strictSame(attempts, ['flaky', 'soon'])
  t.strictSame(await Promise.all(tasks.map(async ({ id, name }) => (await app.backgroundTasks.get(name === 'job' ? job : flaky, id))?.state)), ['delayed', 'delayed', 'retrying'])
  t.equal(waiting.state, 'running')
  await stored.app.ready()
  const receipt = await stored.app.backgroundTasks.enqueue(job, undefined, { delay: 2 * LONG })
  t.equal(receipt.duplicate, false)
  // What has passed until it is stored is no part of it.
  t.ok((engine.stored[0]?.[0]?.delayMs ?? 0) > LONG)
  const closing = app.close()
  await turn()
  t.equal(waiting.state, 'running', 'the drain waits')
  for (const task of tasks.slice(0, 2)) task.cancel()
  tasks[2]?.cancel()
  gate.resolve()
  await closing
  t.match(app.backgroundTasks.stats, { succeeded: 2, skipped: 3, abandoned: 0, pending: 0, running: 0 })
  t.notOk(logs.some(line => line.level >= 40 && line.msg !== 'background task attempt failed: the next one is in 2147483653 ms'), 'no limit has passed')
  t.ok(waits.every(ms => ms < 2 ** 31), `waits up to ${Math.max(...waits)}`)
  t.strictSame(warnings, [])
  t.strictSame(faults, [])
})

t.test('an engine may have longer than Node\'s timers take', async t => {
  const [warnings, waits] = [watchWarnings(t), watchTimers(t)]
  const [engine, gate] = [new StubEngine(), deferred()]
  engine.onEnqueue = async () => { await gate.promise }
  const job = defineTask({ name: 'job', handler () {} })
  const { app } = await start(t, { tasks: [job], engine, enqueueTimeout: LONG })
  await app.ready()
  const receipt = app.backgroundTasks.enqueue(job)
  await pass(10)
  gate.resolve()
  t.match(await receipt, { duplicate: false })
  t.ok(waits.every(ms => ms < 2 ** 31), `waits up to ${Math.max(...waits)}`)
  t.strictSame(warnings, [])
})

t.test('a task whose time comes after the deadline is abandoned by it, and named, however far that is', async t => {
  const ran: string[] = []
  const job = defineTask({ name: 'job', retry: { attempts: 2, backoff: { delay: LONG, maxDelay: LONG } }, handler (payload) { ran.push(String(payload)); throw new Error('x') } })
  const { app, logs } = await start(t, { tasks: [job], closeTimeout: 60_000 })
  app.get('/', async request => {
    request.backgroundTasks.addTask(job, 'delayed' as never, { delay: LONG })
    request.backgroundTasks.addTask(job, 'retried' as never)
    return 'ok'
  })
  await app.inject('/')
  while (ran.length === 0) await turn()
  await turn()
  const startedAt = performance.now()
  await app.close()
  t.ok(performance.now() - startedAt < 10_000)
  t.strictSame(ran, ['retried'])
  t.match(logs.filter(line => line.msg.startsWith('background tasks abandoned')), [{ level: 50, tasks: [{ name: 'job' }, { name: 'job' }] }])
  t.match(app.backgroundTasks.stats, { abandoned: 2, pending: 0, running: 0 })
})

t.test('a wait that is longer than Node\'s timers ends when all of it has passed', async t => {
  let ran = false
  const job = defineTask({ name: 'job', handler () { ran = true } })
  const { app } = await start(t, { tasks: [job] })
  await app.ready()
  const clock = ownClock(t)
  const task = app.backgroundTasks.addTask(job, undefined, { delay: 2 * LONG })
  await clock.pass(2 ** 31 - 1)
  t.equal(ran, false)
  await clock.pass(2 ** 31 - 1)
  t.equal(ran, false)
  t.equal(task.state, 'pending')
  await clock.pass(100)
  t.equal(ran, true)
  t.equal(task.state, 'succeeded')
})

const mocks: Array<Parameters<typeof mock.timers.enable>[0]> = [
  { apis: ['setImmediate'] }, { apis: ['setTimeout'] }, { apis: ['Date'] }, { apis: ['setImmediate', 'setTimeout', 'setInterval', 'Date'] }
]
for (const mocked of mocks) {
  t.test(`tasks run while a test has put clocks of its own in place, and ages are right behind it (${String(mocked?.apis)})`, async t => {
    const later = deferred()
    const job = defineTask({ name: 'job', handler () {} })
    const { app, logs } = await start(t, { tasks: [job], closeTimeout: 0 })
    const addThree = async (list: { addTask: (fn: () => Promise<void>) => BackgroundTask }): Promise<void> => {
      for (let i = 0; i < 3; i++) list.addTask(async () => { await Promise.resolve() })
    }
    let gate = deferred()
    app.get('/', async request => { await addThree(request.backgroundTasks); return 'ok' })
    app.get('/long', async request => {
      for (let i = 0; i < 3; i++) request.backgroundTasks.addTask(async () => { await gate.promise })
      return 'ok'
    })
    await app.ready()
    mock.timers.enable(mocked)
    try {
      await app.inject('/')
      await addThree(app.backgroundTasks)
      app.backgroundTasks.addTask(job)
      await app.inject('/long')
      gate.resolve()
      await app.backgroundTasks.idle()
      t.match(app.backgroundTasks.stats, { succeeded: 10, pending: 0, oldestPendingMs: 0 })
    } finally {
      mock.timers.reset()
    }
    gate = later
    await pass(150)
    await app.inject('/long')
    while (app.backgroundTasks.stats.running === 0) await turn()
    const { oldestPendingMs } = app.backgroundTasks.stats
    t.ok(oldestPendingMs >= 0 && oldestPendingMs < 100, `the age of a task just added: ${oldestPendingMs.toFixed()} ms`)
    await app.close()
    const [line] = logs.filter(line => line.msg.startsWith('background tasks abandoned'))
    t.ok((line?.tasks as Array<{ ageMs: number }>).every(({ ageMs }) => ageMs >= 0 && ageMs < 100))
    later.resolve()
  })
}
