/** The nine rules of a task list, each by its number. The exchange side of rule 1 stands in exchange.test.ts. */
import t from 'tap'
import { AsyncLocalStorage, createHook } from 'node:async_hooks'
import { once } from 'node:events'
import http from 'node:http'
import { setImmediate as turn } from 'node:timers/promises'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import backgroundTasks, { BackgroundTask } from '../lib/index.js'
import { deferred, start, type LogLine } from './support/app.js'

t.test('rule 1: a list starts once, when its exchange has ended', async t => {
  const { app, get } = await start(t)
  const ran: string[] = []
  let outcomeInHandler: unknown = 'unset'
  app.get('/', async request => {
    request.backgroundTasks.addTask(() => { ran.push('task') })
    outcomeInHandler = request.backgroundTasks.outcome
    await turn()
    t.strictSame(ran, [], 'not while the handler runs')
    return 'reply'
  })
  t.equal(await get('/'), 'reply')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['task'])
  t.equal(outcomeInHandler, undefined)
})

t.test('rule 2: tasks run in the order of the calls, one at a time, hooks before the route', async t => {
  const { app, get } = await start(t)
  const ran: string[] = []
  let running = 0
  const step = async (name: string): Promise<void> => {
    t.equal(++running, 1, 'one at a time')
    await turn()
    ran.push(name)
    running--
  }
  const sync = (name: string): void => { ran.push(name) }
  const hooks = ['onRequest', 'preParsing', 'preValidation', 'preHandler'] as const
  const nested = (request: FastifyRequest): void => { request.backgroundTasks.addTask(step, 'sub-dependency') }
  for (const hook of hooks) {
    // The hook's own parameters differ, its first one does not.
    app.addHook(hook as 'onRequest', async (request: FastifyRequest) => {
      request.backgroundTasks.addTask(step, hook)
      if (hook === 'preHandler') nested(request)
    })
  }
  app.post('/', async request => {
    request.backgroundTasks.addTask(sync, 'route')
    request.backgroundTasks.addTask(step, 'route again')
    request.backgroundTasks.addTask(sync, 'route at last')
    return 'ok'
  })
  app.get('/', async () => 'ok')
  await app.inject({ method: 'POST', url: '/', payload: {} })
  await app.backgroundTasks.idle()
  t.strictSame(ran, [...hooks, 'sub-dependency', 'route', 'route again', 'route at last'])
  ran.length = 0
  await get('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, [...hooks, 'sub-dependency'], 'lists of different requests share nothing')
})

t.test('rule 2: a synchronous task is not awaited through a promise, a thenable is', async t => {
  const { app } = await start(t)
  const ran: string[] = []
  app.get('/', async request => {
    const tasks = request.backgroundTasks
    tasks.addTask(() => { queueMicrotask(() => { ran.push('microtask') }) })
    tasks.addTask(() => { ran.push('synchronous'); return 'a value' })
    tasks.addTask(() => ({ then: (resolve: () => void) => { setImmediate(() => { ran.push('thenable'); resolve() }) } }))
    tasks.addTask(() => Object.assign(() => {}, { then: (resolve: () => void) => { ran.push('thenable function'); resolve() } }))
    tasks.addTask(() => { ran.push('last') })
    return 'ok'
  })
  // A list gives the event loop back when its turn is up, also between these two: on a busy machine that may be so.
  for (let tries = 0; tries < 20 && ran[0] !== 'synchronous'; tries++) {
    ran.length = 0
    await app.inject('/')
    await app.backgroundTasks.idle()
  }
  t.strictSame(ran, ['synchronous', 'microtask', 'thenable', 'thenable function', 'last'])
})

t.test('rule 2: a task gets the arguments it was added with, no more and no fewer', async t => {
  const { app } = await start(t)
  const got: unknown[][] = []
  const take = (...args: unknown[]): void => { got.push(args) }
  for (const args of [[], [undefined], [1], [1, 2], ['a', {}, null]]) app.backgroundTasks.addTask(take, ...args)
  await app.backgroundTasks.idle()
  t.strictSame(got, [[], [undefined], [1], [1, 2], ['a', {}, null]])
})

t.test('rule 3: late tasks run, in order, behind what is already there, under their own `when`', async t => {
  const { app, get } = await start(t)
  const ran: string[] = []
  const log = (name: string): void => { ran.push(name) }
  const timer = deferred()
  const fired = deferred()
  app.addHook('onResponse', async request => { request.backgroundTasks.addTask(log, 'onResponse') })
  app.get('/', async request => {
    const tasks = request.backgroundTasks
    tasks.addTask(() => {
      log('first')
      tasks.addTask(async () => {
        log('nested')
        await turn()
        tasks.addTask(log, 'nested in nested')
        tasks.with({ when: 'error' }).addTask(log, 'never')
      })
    })
    tasks.addTask(log, 'second')
    void timer.promise.then(() => {
      tasks.addTask(log, 'from a timer')
      t.equal(tasks.length, 1)
      fired.resolve()
    })
    return 'ok'
  })
  await get('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['first', 'second', 'onResponse', 'nested', 'nested in nested'])
  timer.resolve()
  await fired.promise
  t.not(ran.at(-1), 'from a timer', 'on a later turn')
  await app.backgroundTasks.idle()
  t.equal(ran.at(-1), 'from a timer')
  t.match(app.backgroundTasks.stats, { succeeded: 6, skipped: 1, pending: 0 })
})

t.test('rule 4: a throw of anything is logged and reaches onError, and the next task runs', async t => {
  const seen: unknown[] = []
  const { app, logs, get } = await start(t, {
    onError: (error, task, request) => { seen.push([error, task.name, task.state, request?.url]) }
  })
  const broken = new Error('broken')
  const secret = { password: 'hunter2' }
  const after = deferred()
  app.get('/', async request => {
    const tasks = request.backgroundTasks
    tasks.addTask(function throwing (_: object) { throw broken }, secret)
    tasks.addTask(async function rejecting (_: object) { await turn(); throw broken }, secret)
    tasks.addTask(function throwingUndefined () { throw undefined }) // eslint-disable-line no-throw-literal
    tasks.addTask(async () => await Promise.reject(null)) // eslint-disable-line prefer-promise-reject-errors
    tasks.addTask(function hostile () { return { get then () { throw broken } } })
    tasks.addTask(() => { after.resolve() })
    return 'ok'
  })
  t.equal(await get('/'), 'ok')
  await after.promise
  await app.backgroundTasks.idle()
  t.strictSame(seen, [
    [broken, 'throwing', 'failed', '/'],
    [broken, 'rejecting', 'failed', '/'],
    [undefined, 'throwingUndefined', 'failed', '/'],
    [null, 'anonymous', 'failed', '/'],
    [broken, 'hostile', 'failed', '/']
  ])
  const lines = logs.filter(line => line.msg === 'background task failed')
  t.strictSame(lines.map(line => line.task?.name), ['throwing', 'rejecting', 'throwingUndefined', 'anonymous', 'hostile'])
  t.match(lines[0], { level: 50, reqId: String, err: { message: 'broken' }, task: { id: String } })
  t.notMatch(JSON.stringify(logs), 'hunter2')
  t.match(app.backgroundTasks.stats, { failed: 5, succeeded: 1 })
  await t.rejects(app.backgroundTasks.idle({ rejectOnFailure: true }).then(() => { throw new Error('idle() took them') }), /took them/)
})

t.test('rule 4: onError is waited for, and its own failure is logged', async t => {
  const ran: string[] = []
  const { app, logs } = await start(t, {
    onError: async (error) => {
      await turn()
      ran.push('onError')
      if (error === 'async') throw new Error('onError rejected')
    }
  })
  app.get('/', async request => {
    request.backgroundTasks.addTask(() => { throw 'sync' }) // eslint-disable-line no-throw-literal
    request.backgroundTasks.addTask(() => { ran.push('next') })
    request.backgroundTasks.addTask(async () => { throw 'async' }) // eslint-disable-line no-throw-literal
    request.backgroundTasks.addTask(() => { ran.push('last') })
    return 'ok'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['onError', 'next', 'onError', 'last'])
  t.match(logs.filter(line => line.msg.startsWith('onError of')), [{ err: { message: 'onError rejected' }, task: { name: 'anonymous' } }])

  const throwing = await start(t, { onError: () => { throw new Error('onError threw') } })
  throwing.app.backgroundTasks.addTask(() => { throw new Error('no request') })
  await t.rejects(throwing.app.backgroundTasks.idle({ rejectOnFailure: true }), { message: 'no request' })
  t.ok(throwing.logs.find(line => line.err?.message === 'onError threw'))
})

t.test('rule 4: a failing logger and an error with hostile getters stop nothing; one log line is tried', async t => {
  const app = Fastify({ loggerInstance: hostileLogger() })
  t.teardown(() => app.close())
  await app.register(backgroundTasks, { timeout: 1, waitUntil: () => { throw new Error('no platform') } })
  let tried = 0
  app.log.error = () => { tried++; throw new Error('disk full') }
  const ran: string[] = []
  app.get('/', async request => {
    const tasks = request.backgroundTasks
    tasks.addTask(() => { throw new Error('one') })
    tasks.addTask(() => { ran.push('next') })
    tasks.with({ when: 'error' }).addTask(() => {})
    return 'ok'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['next'])
  t.equal(tried, 2, 'waitUntil, and the failed task')

  const { app: logged, logs } = await start(t)
  logged.backgroundTasks.addTask(() => { throw Object.defineProperty(new Error('x'), 'stack', { get () { throw new Error('hostile') } }) })
  logged.backgroundTasks.addTask(() => { ran.push('after the hostile one') })
  await logged.backgroundTasks.idle()
  t.equal(ran.at(-1), 'after the hostile one')
  t.ok(logs.length <= 1)
})

t.test('rule 5: the reply, other hooks, the request log and the next request on the connection wait for nothing', async t => {
  const { app, logs, address } = await start(t)
  const never = deferred()
  const responded: string[] = []
  app.addHook('onResponse', async request => { responded.push(request.url) })
  app.get('/slow', async request => {
    request.backgroundTasks.addTask(async () => { await never.promise })
    return 'slow'
  })
  app.get('/next', async () => 'next')
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 })
  t.teardown(() => { agent.destroy() })
  const get = async (path: string): Promise<http.IncomingMessage> => {
    const [response] = await once(http.get(await address() + path, { agent }), 'response') as [http.IncomingMessage]
    response.resume()
    await once(response, 'end')
    return response
  }
  await get('/slow')
  await get('/next')
  t.strictSame(responded, ['/slow', '/next'])
  t.equal(logs.filter(line => line.msg === 'request completed').length, 2)
  t.equal(app.backgroundTasks.length, 1)
  never.resolve()
})

t.test('rule 5: lists that become ready in the same turn share one setImmediate', async t => {
  const { app } = await start(t)
  let immediates = 0
  const hook = createHook({ init (_id, type) { if (type === 'Immediate') immediates++ } }).enable()
  for (let i = 0; i < 10; i++) app.backgroundTasks.addTask(() => {})
  hook.disable()
  t.equal(immediates, 1)
  await app.backgroundTasks.idle()
  t.equal(app.backgroundTasks.stats.succeeded, 10)
})

t.test('rule 6: long runs of tasks give the event loop back, and lists take turns', async t => {
  const busy = (ms: number): void => {
    const end = performance.now() + ms
    while (performance.now() < end);
  }
  const cases: Record<string, () => unknown> = {
    'synchronous tasks': () => { busy(1) },
    'tasks that never really wait': async () => { busy(1) },
    'short tasks': () => { busy(0.01) }
  }
  for (const [name, task] of Object.entries(cases)) {
    const { app } = await start(t)
    let turns = 0
    let others = 0
    let counting = true
    const count = (): void => {
      turns++
      if (counting) setImmediate(count)
    }
    const amount = name === 'short tasks' ? 10_000 : 100
    app.get('/', async request => {
      for (let i = 0; i < amount; i++) request.backgroundTasks.addTask(task)
      request.backgroundTasks.addTask(() => {
        t.equal(others, 5, 'lists that came later did not wait for all of it')
        counting = false
      })
      return 'ok'
    })
    await app.inject('/')
    for (let i = 0; i < 5; i++) app.backgroundTasks.addTask(() => { others++ })
    count()
    await app.backgroundTasks.idle()
    // 100 ms of work in turns of a few milliseconds.
    t.ok(turns >= 10, `${name}: ${turns} turns`)
  }
})

t.test('rule 7: a task sees the AsyncLocalStorage stores of its addTask call', async t => {
  const { app, get } = await start(t)
  const storage = new AsyncLocalStorage<string>()
  const seen: Array<[string, string | undefined]> = []
  const see = (name: string): void => { seen.push([name, storage.getStore()]) }
  const seeLater = async (name: string): Promise<void> => {
    await turn()
    see(name)
  }
  const elsewhere = storage.run('elsewhere', () => new BackgroundTask(see, 'made elsewhere'))
  app.get('/', async request => {
    const tasks = request.backgroundTasks
    tasks.addTask(see, 'outside')
    storage.run('one', () => {
      tasks.addTask(see, 'one')
      tasks.addTask(elsewhere)
      tasks.addCleanup(see, 'cleanup')
    })
    await turn()
    storage.run('two', () => tasks.addTask(seeLater, 'two'))
    storage.run('three', () => tasks.addTask(() => {
      see('three')
      tasks.addTask(see, 'nested in three')
    }))
    return 'ok'
  })
  await get('/')
  await app.backgroundTasks.idle()
  t.strictSame(seen, [
    ['outside', undefined], ['one', 'one'], ['made elsewhere', 'one'], ['two', 'two'], ['three', 'three'],
    ['nested in three', 'three'], ['cleanup', 'one']
  ])
})

t.test('rule 7: failures are logged and reported in the context of their task', async t => {
  const storage = new AsyncLocalStorage<string>()
  const stores: Array<string | undefined> = []
  const { app } = await start(t, { onError: () => { stores.push(storage.getStore()) } })
  storage.run('first', () => app.backgroundTasks.addTask(() => {}))
  storage.run('second', () => app.backgroundTasks.addTask(() => { throw new Error('x') }))
  storage.run('third', () => app.backgroundTasks.addTask(async () => { throw new Error('y') }))
  await app.backgroundTasks.idle()
  t.strictSame(stores, ['second', 'third'])
})

t.test('rule 8: nothing is left behind', { skip: globalThis.gc === undefined && 'needs --expose-gc' }, async t => {
  const { app } = await start(t)
  const heldTasks: BackgroundTask[] = []
  const heldLists: unknown[] = []
  const refs: Array<WeakRef<object>> = []
  const storage = new AsyncLocalStorage<object>()
  const remember = (): object => {
    const object = { big: new Array(1000) }
    refs.push(new WeakRef(object))
    return object
  }
  app.get('/', async request => {
    const tasks = request.backgroundTasks
    storage.run(remember(), () => {
      heldTasks.push(tasks.addTask((_: object) => remember(), remember()))
      heldTasks.push(tasks.addTask(async (_: object) => { throw remember() }, remember()))
      const cancelled = tasks.addTask((_: object) => {}, remember())
      cancelled.cancel()
      heldTasks.push(cancelled, tasks.with({ when: 'error' }).addTask((_: object) => {}, remember()))
      tasks.addCleanup((_: object) => {}, remember())
    })
    heldLists.push(tasks)
    return 'ok'
  })
  const holder = deferred()
  app.get('/never', async request => {
    request.backgroundTasks.addTask(async () => { await holder.promise })
    return 'ok'
  })
  for (let i = 0; i < 10; i++) await app.inject('/')
  await app.inject('/never')
  while (app.backgroundTasks.stats.running !== 1 || app.backgroundTasks.length !== 1) await turn()
  // The failures kept for idle({ rejectOnFailure }) go with it, as does what V8 keeps for the current job.
  holder.resolve()
  await app.backgroundTasks.idle()
  for (let i = 0; i < 5; i++) {
    await turn()
    globalThis.gc?.()
  }
  t.equal(refs.filter(ref => ref.deref() !== undefined).length, 0, `of ${refs.length}`)
  t.strictSame(heldTasks.slice(0, 4).map(task => task.state), ['succeeded', 'failed', 'skipped', 'skipped'])
})

t.test('rule 8: a turn keeps no store of the request that asked for it', { skip: globalThis.gc === undefined && 'needs --expose-gc' }, async t => {
  const { app } = await start(t)
  const storage = new AsyncLocalStorage<object>()
  const never = deferred()
  let ref: WeakRef<object> | undefined
  const addFirst = (): void => {
    const store = { big: new Array(1000) }
    ref = new WeakRef(store)
    storage.run(store, () => { app.backgroundTasks.addTask(() => {}) })
  }
  addFirst()
  app.backgroundTasks.addTask(async () => { await never.promise })
  for (let i = 0; i < 5; i++) {
    await turn()
    globalThis.gc?.()
  }
  t.match(app.backgroundTasks.stats, { succeeded: 1, running: 1 })
  t.equal(ref?.deref(), undefined)
  never.resolve()
})

t.test('rule 9: a request that adds no task has no list', async t => {
  const { app, get } = await start(t)
  app.get('/', async request => {
    const symbols = Object.getOwnPropertySymbols(request).filter(symbol => String(symbol).includes('fastify-background-tasks'))
    const values = symbols.map(symbol => Reflect.get(request, symbol) as unknown)
    t.ok(symbols.length > 0)
    t.notOk(values.some(value => typeof value === 'object' && value !== null && !('raw' in value)), 'nothing but the reply')
    return 'ok'
  })
  t.equal(await get('/'), 'ok')
})

t.test('cleanups run when the list has ended, last added first, whatever failed or was skipped', async t => {
  const { app, logs } = await start(t)
  const ran: string[] = []
  app.get('/', async request => {
    const tasks = request.backgroundTasks
    tasks.addCleanup(() => { ran.push('cleanup 1') })
    tasks.addTask(() => { ran.push('task'); throw new Error('x') })
    tasks.addCleanup(async () => { await turn(); ran.push('cleanup 2'); throw new Error('broken cleanup') })
    tasks.addTask(() => { ran.push('cancelled') }).cancel()
    tasks.addCleanup(() => { ran.push('cleanup 3'); tasks.addTask(() => { ran.push('from a cleanup') }) })
    return 'ok'
  })
  app.get('/cancelled', async request => {
    const task = request.backgroundTasks.addTask(() => { ran.push('cancelled') })
    request.backgroundTasks.addCleanup(name => { ran.push(name) }, 'cleanup of a cancelled list')
    t.equal(task.cancel(), true)
    t.equal(task.cancel(), false)
    return 'ok'
  })
  app.get('/late', async request => {
    setImmediate(() => setImmediate(() => { request.backgroundTasks.addCleanup(() => { ran.push('late cleanup') }) }))
    return 'ok'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['task', 'cleanup 3', 'from a cleanup', 'cleanup 2', 'cleanup 1'])
  t.match(logs.filter(line => line.msg === 'background task failed').map(line => line.err?.message), ['x', 'broken cleanup'])
  t.match(app.backgroundTasks.stats, { succeeded: 1, failed: 1, skipped: 1 })
  ran.length = 0
  await app.inject('/cancelled')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['cleanup of a cancelled list'])
  await app.inject('/late')
  while (ran.length < 2) await turn()
  t.strictSame(ran[1], 'late cleanup')
})

t.test('a task by itself: name, id, state, signal, cancel and run', async t => {
  const { app } = await start(t)
  function named (): void {}
  t.equal(new BackgroundTask(named).name, 'named')
  t.equal(new BackgroundTask(() => {}).name, 'anonymous')
  const task = new BackgroundTask(named)
  t.match(task.id, /^[0-9a-f-]{36}$/)
  t.equal(task.id, task.id)
  t.equal(task.state, 'pending')
  await task.run()
  t.equal(task.state, 'succeeded')
  await t.rejects(task.run(), { code: 'FST_BGT_INVALID_TASK', message: /"named", which is succeeded/ })
  const failing = new BackgroundTask(async (text: string) => { throw new Error(text) }, 'by hand')
  await t.rejects(failing.run(), { message: 'by hand' })
  t.equal(failing.state, 'failed')
  t.equal(failing.signal.aborted, false)
  const added = app.backgroundTasks.addTask(named)
  t.equal(app.backgroundTasks.length, 1)
  await t.rejects(added.run(), /on a list already/)
  t.equal(added.cancel(), true)
  t.equal(app.backgroundTasks.length, 0)
  await app.backgroundTasks.idle()
  t.equal(added.state, 'skipped')
  t.equal(app.backgroundTasks.with({ name: 'audit', timeout: 1000 }).addTask(named).name, 'audit')
})

t.test('concurrency bounds the lists that run at once; a late task takes a seat again', async t => {
  const { app } = await start(t, { concurrency: 2 })
  let running = 0
  let most = 0
  const order: number[] = []
  const gate = deferred()
  const work = async (i: number): Promise<void> => {
    most = Math.max(most, ++running)
    order.push(i)
    await gate.promise
    running--
  }
  const tasks = [1, 2, 3, 4, 5].map(i => app.backgroundTasks.addTask(work, i))
  await turn()
  await turn()
  t.strictSame(order, [1, 2])
  t.match(app.backgroundTasks.stats, { running: 2, pending: 3 })
  t.equal(tasks[3]?.cancel(), true)
  gate.resolve()
  await app.backgroundTasks.idle()
  t.strictSame(order, [1, 2, 3, 5])
  t.equal(most, 2)
})

t.test('timeout: the task fails, its signal aborts, the list goes on, a late end is swallowed', async t => {
  const errors: unknown[] = []
  const { app, logs } = await start(t, { timeout: 250, onError: error => { errors.push(error) } })
  const late = deferred()
  const lateRejection = deferred()
  const ran: string[] = []
  app.get('/', async request => {
    const tasks = request.backgroundTasks
    const task = tasks.addTask(async function slow () {
      await once(task.signal, 'abort')
      ran.push(`aborted: ${String(task.signal.reason.code)}`)
      await late.promise
    })
    tasks.addTask(async () => { await lateRejection.promise; throw new Error('late') })
    tasks.addTask(() => { ran.push('next') })
    tasks.with({ timeout: 60_000 }).addTask(async () => { await turn(); ran.push('has time') })
    tasks.addTask(async () => { await turn(); ran.push('in time') })
    tasks.addTask(function blocking () {
      const end = performance.now() + 260
      while (performance.now() < end);
    })
    tasks.addCleanup(async () => { await late.promise })
    return 'ok'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['aborted: FST_BGT_TIMEOUT', 'next', 'has time', 'in time'])
  t.match(errors, [{ code: 'FST_BGT_TIMEOUT', message: /"slow" did not finish within its timeout of 250 ms/ }, { code: 'FST_BGT_TIMEOUT' }, { code: 'FST_BGT_TIMEOUT' }])
  t.match(app.backgroundTasks.stats, { failed: 2, succeeded: 4, running: 0 })
  t.match(logs.find(line => line.level === 40), { task: { name: 'blocking' }, msg: /outlasted its timeout of 250 ms/ })
  late.resolve()
  lateRejection.resolve()
  await turn()
  t.equal(logs.filter(line => line.level === 20 && line.msg === 'background task ended after it was cut off').length, 3)
  t.match(app.backgroundTasks.stats, { failed: 2, succeeded: 4 })
})

t.test('slowTask names a task that still runs, once', async t => {
  const { app, logs } = await start(t, { slowTask: 250 })
  const warnings = (): LogLine[] => logs.filter(line => line.level === 40)
  app.backgroundTasks.addTask(async function waiting () { while (warnings().length === 0) await turn() })
  await app.backgroundTasks.idle()
  app.backgroundTasks.addTask(function blocking () {
    const end = performance.now() + 260
    while (performance.now() < end);
  })
  app.backgroundTasks.addTask(async () => { await turn() })
  app.backgroundTasks.addTask(() => {})
  await app.backgroundTasks.idle()
  t.strictSame(warnings().map(line => line.task?.name), ['waiting', 'blocking'])
})

t.test('idle waits for requests in flight and tasks added by tasks, and can reject with what failed', async t => {
  const { app, get } = await start(t)
  const entered = deferred()
  const gate = deferred()
  const ran: string[] = []
  app.get('/', async request => {
    request.backgroundTasks.addTask(() => {
      ran.push('task')
      app.backgroundTasks.addTask(async () => { await turn(); ran.push('added by a task') })
    })
    entered.resolve()
    await gate.promise
    return 'ok'
  })
  const reply = get('/')
  await entered.promise
  const idle = app.backgroundTasks.idle()
  t.ok(app.backgroundTasks.stats.oldestPendingMs > 0)
  gate.resolve()
  await idle
  t.strictSame(ran, ['task', 'added by a task'])
  t.equal(app.backgroundTasks.stats.oldestPendingMs, 0)
  await reply

  const fail = (i: number): void => { throw new Error(String(i)) }
  for (let i = 0; i < 150; i++) app.backgroundTasks.addTask(fail, i)
  await t.rejects(app.backgroundTasks.idle({ rejectOnFailure: true }), { name: 'AggregateError', errors: { length: 100 } })
  await app.backgroundTasks.idle({ rejectOnFailure: true })
})

t.test('waitUntil is called at the first addTask of a request, in its context, and again for late tasks', async t => {
  const storage = new AsyncLocalStorage<string>()
  const calls: Array<{ store: string | undefined, promise: Promise<void> }> = []
  const { app } = await start(t, { waitUntil: promise => { calls.push({ store: storage.getStore(), promise }) } })
  const ran: string[] = []
  let list: FastifyRequest['backgroundTasks'] | undefined
  app.get('/', async request => {
    list = request.backgroundTasks
    storage.run('request', () => list?.addTask(async () => { await turn(); ran.push('task'); throw new Error('x') }))
    list.addTask(() => { ran.push('second') })
    return 'ok'
  })
  app.get('/cancelled', async request => {
    request.backgroundTasks.addTask(() => {}).cancel()
    return 'ok'
  })
  app.backgroundTasks.addTask(() => {})
  await app.inject('/')
  t.equal(calls.length, 1)
  t.equal(calls[0]?.store, 'request')
  await calls[0]?.promise
  t.strictSame(ran, ['task', 'second'])
  list?.addTask(() => { ran.push('late') })
  t.equal(calls.length, 2)
  await calls[1]?.promise
  t.equal(ran.at(-1), 'late')
  await app.inject('/cancelled')
  await calls[2]?.promise
})

t.test('stopOnError skips the rest of the list, late tasks included, and no cleanup', async t => {
  const { app } = await start(t, { stopOnError: true })
  const ran: string[] = []
  let list: FastifyRequest['backgroundTasks'] | undefined
  app.get('/', async request => {
    list = request.backgroundTasks
    list.addTask(() => { ran.push('first') })
    list.addTask(() => { throw new Error('x') })
    list.addTask(() => { ran.push('skipped') })
    list.addCleanup(() => { ran.push('cleanup'); throw new Error('y') })
    return 'ok'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['first', 'cleanup'])
  list?.addTask(() => { ran.push('late') })
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['first', 'cleanup'])
  t.match(app.backgroundTasks.stats, { succeeded: 1, failed: 1, skipped: 2 })
})

function hostileLogger (): FastifyInstance['log'] {
  const fail = (): void => { throw new Error('disk full') }
  const log = { level: 'debug', trace: fail, debug: fail, info: () => {}, warn: fail, error: fail, fatal: fail, silent: () => {}, child: () => log }
  return log as unknown as FastifyInstance['log']
}
