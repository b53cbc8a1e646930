/** What other people's code may do: throw from where nobody expects it, lie, cancel itself. It costs its own task, and nothing else. */
import t, { type Test } from 'tap'
import { channel } from 'node:diagnostics_channel'
import http from 'node:http'
import { setImmediate as turn } from 'node:timers/promises'
import vm from 'node:vm'
import type { FastifyBaseLogger } from 'fastify'
import { defineTask, type BackgroundTask, type FastifyBackgroundTasksOptions, type TaskCondition } from '../lib/index.js'
import { deferred, start, type Started } from './support/app.js'
import { watchFaults } from './support/faults.js'
import { StubEngine } from './support/stub-engine.js'

const hostile = (): never => { throw new Error('hostile') }

/** Runs a fault in a request, and looks whether anything else has noticed: the next task, another list, the counts, the process. */
async function runFault (t: Test, options: FastifyBackgroundTasksOptions, add: (tasks: Started['app']['backgroundTasks'], started: Started) => unknown, what = ''): Promise<Started> {
  const faults = watchFaults(t)
  const started = await start(t, options)
  const { app } = started
  const ran: string[] = []
  app.get('/', async request => {
    // `with` of the app takes less; the rest is the same.
    add(request.backgroundTasks as unknown as Started['app']['backgroundTasks'], { ...started, app: Object.create(app, { log: { value: request.log } }) as Started['app'] })
    request.backgroundTasks.addTask(() => { ran.push('next') })
    request.backgroundTasks.addCleanup(() => { ran.push('cleanup') })
    return 'ok'
  })
  app.get('/other', async request => {
    request.backgroundTasks.addTask(() => { ran.push('other') })
    return 'ok'
  })
  await Promise.all([app.inject('/'), app.inject('/other')])
  await app.backgroundTasks.idle()
  app.backgroundTasks.addTask(() => { ran.push('app') })
  await app.backgroundTasks.idle()
  await turn()
  t.strictSame(ran.sort(), ['app', 'cleanup', 'next', 'other'], `${what}: all else runs`)
  const { pending, running } = app.backgroundTasks.stats
  t.strictSame({ pending, running }, { pending: 0, running: 0 }, `${what}: the counts`)
  t.strictSame(faults, [], `${what}: the process hears nothing`)
  return started
}

const names: Record<string, PropertyDescriptor> = {
  'that throws': { get: hostile },
  'that is a number': { value: 42 },
  'that is a symbol': { value: Symbol('name') },
  'that is an object': { value: { toString: hostile } },
  'that is empty': { value: '' },
  'that is a callable proxy': { get: () => rpc() }
}

/** As a proxy of Comlink: each of its properties is one, too. */
function rpc (): () => Promise<void> {
  return new Proxy(async () => { await turn() }, { get: (_, key) => key === 'then' ? undefined : rpc() })
}

t.test('a function whose name cannot be read is anonymous', async t => {
  for (const [name, descriptor] of Object.entries(names)) {
    const tasks: BackgroundTask[] = []
    await runFault(t, { slowTask: 60_000 }, adder => {
      tasks.push(adder.addTask(Object.defineProperty(() => {}, 'name', descriptor)))
      tasks.push(adder.addTask(Object.defineProperty(async () => { await turn(); throw new Error('x') }, 'name', descriptor)))
    }, `a name ${name}`)
    t.strictSame(tasks.map(task => [task.name, task.state]), [['anonymous', 'succeeded'], ['anonymous', 'failed']], name)
  }
})

t.test('a callable proxy is a function like any other: the drain counts it, waits for it and names it', async t => {
  for (const closeTimeout of [8_000, 0]) {
    const { app, logs } = await start(t, { closeTimeout })
    await app.ready()
    const task = app.backgroundTasks.addTask(rpc())
    const { proxy, revoke } = Proxy.revocable(() => {}, {})
    revoke()
    const revoked = app.backgroundTasks.addTask(proxy)
    await app.close()
    t.strictSame([task.state, revoked.state], closeTimeout === 0 ? ['abandoned', 'abandoned'] : ['succeeded', 'failed'])
    t.match(logs.filter(line => line.msg === 'waiting for background tasks'), [{ tasks: { anonymous: 2 } }])
  }
})

const revokedProxy = (): object => {
  const { proxy, revoke } = Proxy.revocable({}, {})
  revoke()
  return proxy
}

const getter = (key: string): Error => Object.defineProperty(new Error('x'), key, { get: hostile })

/** What can be thrown, and what a record says of it. */
const errors: Record<string, { make: () => unknown, record?: { name?: string, message?: string, code?: string } }> = {
  'an error whose message throws': { make: () => getter('message'), record: { name: 'Error' } },
  'an error whose name throws': { make: () => getter('name'), record: { message: 'x' } },
  'an error whose code throws': { make: () => getter('code'), record: { name: 'Error', message: 'x' } },
  'an error whose stack throws': { make: () => getter('stack'), record: { name: 'Error', message: 'x' } },
  'an error whose cause throws': { make: () => getter('cause'), record: { name: 'Error', message: 'x' } },
  'an error that makes no JSON': { make: () => Object.assign(new Error('x'), { toJSON: hostile }), record: { message: 'x' } },
  'an error whose message is no string': { make: () => Object.assign(new Error(), { message: { toString: hostile } }), record: { name: 'Error' } },
  'a frozen error': { make: () => Object.freeze(new RangeError('frozen')), record: { name: 'RangeError', message: 'frozen' } },
  'an error of another realm': { make: () => vm.runInNewContext('Object.assign(new TypeError("no such mailbox"), { code: "E550" })'), record: { name: 'TypeError', message: 'no such mailbox', code: 'E550' } },
  'a proxy of an error': { make: () => new Proxy(new Error('behind a proxy'), {}), record: { message: 'behind a proxy' } },
  'a proxy with hostile traps': { make: () => new Proxy(new Error('x'), { get: hostile, has: hostile, getPrototypeOf: hostile, ownKeys: hostile, getOwnPropertyDescriptor: hostile }) },
  'a revoked proxy': { make: revokedProxy },
  'a function whose name throws': { make: () => Object.defineProperty(() => {}, 'name', { get: hostile }) },
  'an object without a prototype': { make: () => Object.create(null) },
  undefined: { make: () => undefined },
  null: { make: () => null },
  'a string': { make: () => 'thrown' },
  'a symbol': { make: () => Symbol('thrown') },
  'a bigint': { make: () => 1n }
}

t.test('whatever is thrown fails its task: one log line, onError, the next task; idle() rejects with it', async t => {
  for (const [name, { make }] of Object.entries(errors)) {
    const seen: unknown[] = []
    const error = make()
    let tried = 0
    const { app } = await runFault(t, { onError: error => { seen.push(error) } }, (tasks, { app: { log } }) => {
      const original = log.error.bind(log)
      log.error = (...args: Parameters<typeof original>) => { tried++; original(...args) }
      tasks.addTask(() => { throw error })
      tasks.addTask(async () => { await turn(); throw error })
      tasks.with({ when: () => { throw error } } as object).addTask(() => {})
    }, name)
    t.equal(seen.length, 3, name)
    t.ok(seen.every(one => one === error), name)
    t.equal(tried, 3, `${name}: one line each`)
    t.match(app.backgroundTasks.stats, { failed: 3, succeeded: 3 }, name)
    app.backgroundTasks.addTask(() => { throw error })
    const rejected = await app.backgroundTasks.idle({ rejectOnFailure: true }).then(() => 'resolved', (reason: unknown) => [reason])
    t.ok(Array.isArray(rejected) && rejected[0] === error, `${name}: idle()`)
  }
})

t.test('whatever an attempt throws is retried, and the record says of it what can be read', async t => {
  for (const [name, { make, record = {} }] of Object.entries(errors)) {
    const attempts: number[] = []
    let failedWith: unknown[] = []
    const error = make()
    const mail = defineTask({
      name: 'mail',
      retry: { attempts: 2, backoff: { delay: 0 } },
      async handler (_, { attempt }) { attempts.push(attempt); throw error },
      onFailed (_, error) { failedWith = [error]; throw error }
    })
    let task: BackgroundTask | undefined
    const { app } = await runFault(t, { tasks: [mail] }, tasks => { task = tasks.addTask(mail) }, name)
    t.strictSame(attempts, [1, 2], name)
    t.ok(failedWith.length === 1 && failedWith[0] === error, name)
    const found = await app.backgroundTasks.get(mail, task?.id ?? '')
    t.match(found, { state: 'failed', attempt: 2, error: { name: String, message: String, ...record } }, name)
  }
})

t.test('a handler that throws a hostile error after its client has left costs its exchange nothing', async t => {
  const faults = watchFaults(t)
  for (const [name, { make }] of Object.entries(errors)) {
    // Fastify itself loses these: neither its hooks nor its client hear of them.
    if (name === 'a revoked proxy' || name === 'a proxy with hostile traps') continue
    const { app, address } = await start(t)
    const [entered, left, ran] = [deferred(), deferred(), deferred()]
    app.setErrorHandler(async () => 'handled')
    app.get('/', async (request, reply) => {
      request.backgroundTasks.with({ when: 'always' }).addTask(() => { ran.resolve() })
      reply.raw.on('close', left.resolve)
      entered.resolve()
      await left.promise
      throw make()
    })
    const client = http.get(await address()).on('error', () => {})
    await entered.promise
    client.destroy()
    await ran.promise
    await app.backgroundTasks.idle()
    t.equal(app.backgroundTasks.stats.succeeded, 1, name)
  }
  t.strictSame(faults, [])
})

for (const method of ['error', 'warn', 'info', 'debug', 'isLevelEnabled', 'child'] as const) {
  t.test(`a logger whose ${method} throws, or cannot be read, stops nothing`, async t => {
    const mail = defineTask({ name: 'mail', retry: { attempts: 2, backoff: { delay: 0 } }, handler: hostile, onFailed: hostile })
    for (const descriptor of [{ value: hostile }, { get: hostile }]) {
      const late = deferred()
      const spoil = (log: FastifyBaseLogger): void => { Object.defineProperty(log, method, { ...descriptor, configurable: true }) }
      const options = { tasks: [mail], onError: hostile, waitUntil: hostile, slowTask: 1 }
      const { app } = await runFault(t, options, (tasks, { app: { log } }) => {
        // Fastify itself has no answer without this one.
        if (method !== 'info') spoil(log)
        tasks.addTask(mail)
        tasks.addTask(hostile)
        tasks.with({ when: 'error' } as object).addTask(() => {})
        tasks.addTask(() => {}).cancel()
        tasks.with({ timeout: 5 }).addTask(async () => { await late.promise })
        tasks.addTask(() => {
          const end = performance.now() + 2
          while (performance.now() < end);
        })
      }, method)
      late.resolve()
      t.match(app.backgroundTasks.stats, { failed: 3, skipped: 2, succeeded: 4 })
      spoil(app.log)
      for (const add of [() => app.backgroundTasks.addTask(mail), () => app.backgroundTasks.addTask(hostile)]) add()
      await app.backgroundTasks.idle()
      app.backgroundTasks.addTask(mail, undefined, { delay: 60_000 })
      await turn()
      await app.close()
      app.backgroundTasks.addTask(() => {})
      t.match(app.backgroundTasks.stats, { failed: 5, abandoned: 2, pending: 0, running: 0 })
    }
  })
}

t.test('a logger that throws costs no delivery of an engine', async t => {
  const engine = new StubEngine()
  const mail = defineTask({ name: 'mail', retry: { attempts: 1 }, handler (payload) { if (payload === 'fails') hostile() }, onFailed: hostile })
  const { app } = await start(t, { tasks: [mail], engine, onError: hostile })
  await app.ready()
  const log = app.log as unknown as Record<string, unknown>
  for (const method of ['error', 'warn', 'info', 'debug', 'isLevelEnabled', 'child']) log[method] = hostile
  t.match(await engine.deliver({ task: 'mail', requestId: 'req-x', payload: 'fails' }), { kind: 'failed', error: { message: 'hostile' } })
  t.match(await engine.deliver({ task: 'mail', requestId: 'req-x', payload: 'ends' }), { kind: 'done' })
})

t.test('a `when` may cancel its own task, others of its list, add more, and throw after that', async t => {
  let list: Started['app']['backgroundTasks'] | undefined
  const tasks: Record<string, BackgroundTask> = {}
  const ran: string[] = []
  const cancel = (name: string): void => { tasks[name]?.cancel() }
  const conditions: Record<string, TaskCondition> = {
    own: () => { cancel('own'); return true },
    ownAndFalse: () => { cancel('ownAndFalse'); return false },
    ownAndThrows: () => { cancel('ownAndThrows'); return hostile() },
    next: () => { cancel('cancelled'); return true },
    cancelled: () => true,
    adds: () => { list?.addTask(() => { ran.push('added') }); return true },
    addsAndThrows: () => { list?.addTask(() => { ran.push('added') }); return hostile() },
    throwsNothing: () => { throw undefined } // eslint-disable-line no-throw-literal
  }
  const failures: unknown[] = []
  const { app } = await runFault(t, { onError: (_error, task) => { failures.push(task.name) } }, adder => {
    list = adder
    for (const [name, when] of Object.entries(conditions)) tasks[name] = adder.with({ when, name } as object).addTask(() => { ran.push(name) })
  }, 'when')
  t.strictSame(Object.fromEntries(Object.entries(tasks).map(([name, { state }]) => [name, state])), {
    own: 'skipped', ownAndFalse: 'skipped', ownAndThrows: 'skipped', next: 'succeeded', cancelled: 'skipped', adds: 'succeeded', addsAndThrows: 'failed', throwsNothing: 'failed'
  })
  t.strictSame(ran, ['next', 'adds', 'added', 'added'])
  t.strictSame(failures, ['addsAndThrows', 'throwsNothing'])
  t.match(app.backgroundTasks.stats, { skipped: 4, failed: 2, succeeded: 7 })
})

for (const placement of ['here', 'on an engine']) {
  t.test(`a \`when\` of a definition that throws fails it at once, without an attempt; one that cancels it skips it (${placement})`, async t => {
    const [attempts, failed]: [string[], unknown[]] = [[], []]
    const engine = new StubEngine()
    const tasks: BackgroundTask[] = []
    const retry = { attempts: 3, backoff: { delay: 0 } }
    const define = (name: string, when: TaskCondition): ReturnType<typeof defineTask> => defineTask({
      name, when, retry, handler () { attempts.push(name) }, onFailed () { attempts.push(`onFailed of ${name}`) }
    }) as ReturnType<typeof defineTask>
    const definitions = [
      define('own', ({ error }) => (error as { code: string }).code === 'X'),
      define('cancels', () => tasks[1]?.cancel() === true),
      define('cancelsAndThrows', () => { tasks[2]?.cancel(); return hostile() })
    ]
    const byWith = defineTask({ name: 'byWith', retry, handler () { attempts.push('byWith') } })
    const { app } = await runFault(t, { tasks: [...definitions, byWith], onError: error => { failed.push(error) }, ...placement === 'here' ? {} : { engine } }, adder => {
      for (const definition of definitions) tasks.push(adder.addTask(definition as never))
      tasks.push(adder.with({ when: hostile } as object).addTask(byWith))
    }, 'when')
    t.strictSame(tasks.map(({ state }) => state), ['failed', 'skipped', 'skipped', 'failed'])
    t.strictSame(attempts, [])
    t.match(failed, [{ name: 'TypeError' }, { message: 'hostile' }])
    t.strictSame(engine.stored, [])
    if (placement !== 'here') return
    const record = await app.backgroundTasks.get(byWith, tasks[3]?.id ?? '')
    t.match(record, { state: 'failed', attempt: 0, error: { message: 'hostile' } })
  })
}

t.test('what cannot be decided is not tried again: a `retry.when` that throws, or whose answer does', async t => {
  const answers: Record<string, () => unknown> = {
    throws: hostile,
    'answers with a thenable that throws': () => ({ get then () { return hostile() } }),
    'answers with a revoked proxy': revokedProxy
  }
  for (const [name, answer] of Object.entries(answers)) {
    let attempts = 0
    const mail = defineTask({ name: 'mail', retry: { attempts: 5, backoff: { delay: 0 }, when: answer as () => boolean }, handler () { attempts++; throw new Error('x') } })
    let task: BackgroundTask | undefined
    await t.test(name, { timeout: 5_000 }, async t => {
      await runFault(t, { tasks: [mail] }, tasks => { task = tasks.addTask(mail) }, name)
      t.equal(task?.state, 'failed')
      t.equal(attempts, 1)
    })
  }
})

/** A channel whose `publish` throws, as a patched one may. */
function spoilChannel (t: Test, name: string): void {
  const spoiled = channel(name)
  const listener = (): void => {}
  spoiled.subscribe(listener)
  spoiled.publish = hostile
  t.teardown(() => {
    Reflect.deleteProperty(spoiled, 'publish')
    spoiled.unsubscribe(listener)
  })
}

const faulty = ['added', 'skipped', 'failed', 'abandoned', 'enqueue', 'enqueued', 'run:start', 'run:end', 'run:asyncStart', 'run:asyncEnd', 'run:error']
for (const name of faulty) {
  t.test(`a fault in the booking costs no other list: ${name}`, { timeout: 10_000 }, async t => {
    const never = deferred()
    const mail = defineTask({ name: 'mail', retry: { attempts: 1 }, async handler (payload) { await turn(); if (payload === 'fails') hostile() } })
    const { app } = await start(t, { tasks: [mail], closeTimeout: 20, timeout: 60_000 })
    const faults = watchFaults(t)
    const ran: string[] = []
    const attempt = (add: () => unknown): void => { try { add() } catch {} }
    app.get('/faulty', async ({ backgroundTasks: tasks }) => {
      attempt(() => tasks.addTask(hostile))
      attempt(() => tasks.addTask(async () => { await turn(); hostile() }))
      attempt(() => tasks.with({ when: 'error' }).addTask(() => {}))
      attempt(() => tasks.addTask(() => {}).cancel())
      attempt(() => tasks.with({ when: hostile }).addTask(() => {}))
      attempt(() => tasks.addTask(mail, 'fails' as never))
      attempt(() => tasks.addTask(mail))
      return 'ok'
    })
    app.get('/', async ({ backgroundTasks: tasks }) => {
      tasks.addTask(() => { ran.push('request') })
      return 'ok'
    })
    await app.ready()
    await t.test('while it throws', async t => {
      spoilChannel(t, name.startsWith('run') ? `tracing:fastify-background-tasks.${name}` : `fastify-background-tasks.${name}`)
      await Promise.all([app.inject('/faulty'), app.inject('/faulty')])
      await app.backgroundTasks.idle()
    })
    await app.inject('/')
    app.backgroundTasks.addTask(() => { ran.push('app') })
    await app.backgroundTasks.idle()
    t.strictSame(ran, ['request', 'app'])
    t.match(app.backgroundTasks.stats, { pending: 0, running: 0 })
    t.equal(app.backgroundTasks.length, 0)
    await t.test('at the deadline', async t => {
      spoilChannel(t, name.startsWith('run') ? `tracing:fastify-background-tasks.${name}` : `fastify-background-tasks.${name}`)
      const alive = setInterval(() => {}, 60_000)
      t.teardown(() => { clearInterval(alive) })
      attempt(() => app.backgroundTasks.addTask(async () => { await never.promise }))
      attempt(() => app.backgroundTasks.addTask(async () => { await never.promise }))
      await turn()
      await app.close()
    })
    t.match(app.backgroundTasks.stats, { pending: 0, running: 0 })
    t.strictSame(faults, [])
    never.resolve()
  })
}
