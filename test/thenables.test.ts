/** Thenables: a lazy one, such as a query builder, starts its work with each `then`; a promise is no answer where a value is asked for. */
import t from 'tap'
import { AsyncLocalStorage } from 'node:async_hooks'
import { once } from 'node:events'
import { tracingChannel } from 'node:diagnostics_channel'
import http from 'node:http'
import { setImmediate as turn } from 'node:timers/promises'
import vm from 'node:vm'
import type { FastifyRequest } from 'fastify'
import { BackgroundTask, defineTask, type FastifyBackgroundTasksOptions } from '../lib/index.js'
import { deferred, start } from './support/app.js'
import { watchFaults } from './support/faults.js'

const storage = new AsyncLocalStorage<string>()

/** A query that runs with each call of `then`, as knex's and drizzle's do. */
class Query implements PromiseLike<unknown> {
  /** How often `then` was read. */
  reads = 0
  /** The store that each call of `then` saw. */
  readonly calls: Array<string | undefined> = []
  readonly #run: () => Promise<unknown>

  constructor (run: () => Promise<unknown> = async () => await turn()) {
    this.#run = run
  }

  get then (): PromiseLike<unknown>['then'] {
    this.reads++
    return (resolve, reject) => {
      this.calls.push(storage.getStore())
      return this.#run().then(resolve, reject)
    }
  }
}

const fails = async (): Promise<void> => { await turn(); throw new Error('query') }

for (const [name, options] of Object.entries<FastifyBackgroundTasksOptions>({ 'no limits': {}, 'a timeout': { timeout: 60_000 }, 'slow tasks watched': { slowTask: 60_000 } })) {
  t.test(`a lazy thenable that a task or a cleanup returns runs once, in the context of its call (${name})`, async t => {
    const { app } = await start(t, options)
    const queries = { task: new Query(), failing: new Query(fails), late: new Query(), cleanup: new Query(), ofApp: new Query() }
    const task = queries.task
    app.get('/', async request => {
      const { backgroundTasks: tasks } = request
      storage.run('failing', () => tasks.addTask(() => queries.failing))
      storage.run('task', () => tasks.addTask(() => task))
      storage.run('late', () => tasks.addTask(async () => await queries.late))
      storage.run('cleanup', () => { tasks.addCleanup(() => queries.cleanup) })
      return 'ok'
    })
    await storage.run('request', async () => await app.inject('/'))
    storage.run('ofApp', () => app.backgroundTasks.addTask(() => queries.ofApp))
    await app.backgroundTasks.idle()
    for (const [store, query] of Object.entries(queries)) t.strictSame(query.calls, [store], store)
    t.equal(task.reads, 1)
    t.match(app.backgroundTasks.stats, { succeeded: 3, failed: 1, pending: 0, running: 0 })
  })
}

t.test('a lazy thenable of a traced task, and of one run by hand, runs once', async t => {
  const { app } = await start(t)
  const channel = tracingChannel('fastify-background-tasks.run')
  const subscribers = { start () {}, end () {}, asyncStart () {}, asyncEnd () {}, error () {} }
  channel.subscribe(subscribers)
  t.teardown(() => { channel.unsubscribe(subscribers) })
  const [traced, byHand] = [new Query(), new Query()]
  storage.run('traced', () => app.backgroundTasks.addTask(() => traced))
  await app.backgroundTasks.idle()
  t.strictSame(traced.calls, ['traced'])
  const task = storage.run('by hand', () => new BackgroundTask(() => byHand))
  await task.run()
  t.strictSame(byHand.calls, ['by hand'])
})

t.test('a lazy thenable of onError, of a definition\'s handler and of its onFailed runs once, in the task\'s context', async t => {
  const queries = { onError: new Query(), handler: new Query(fails), onFailed: new Query() }
  const mail = defineTask({
    name: 'mail',
    retry: { attempts: 1 },
    handler: () => queries.handler,
    // Its type asks for a promise; a query builder is one to its users.
    onFailed: () => queries.onFailed as unknown as Promise<void>
  })
  const { app } = await start(t, { tasks: [mail], onError: () => queries.onError as unknown as Promise<void> })
  let ran = false
  app.get('/', async request => {
    storage.run('mail', () => request.backgroundTasks.addTask(mail))
    request.backgroundTasks.addTask(() => { ran = true })
    return 'ok'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  for (const [name, query] of Object.entries(queries)) t.strictSame(query.calls, ['mail'], name)
  t.ok(ran)
})

t.test('a lazy thenable of a cleanup that the deadline starts runs once', async t => {
  const { app } = await start(t, { closeTimeout: 0 })
  const [entered, gate] = [deferred(), deferred()]
  const query = new Query(fails)
  app.get('/', async request => {
    storage.run('cleanup', () => { request.backgroundTasks.addCleanup(() => query) })
    entered.resolve()
    await gate.promise
    return 'ok'
  })
  const reply = app.inject('/')
  await entered.promise
  await app.close()
  t.strictSame(query.calls, ['cleanup'])
  gate.resolve()
  await reply
})

const handlers: Record<string, (query: Query, request: FastifyRequest) => unknown> = {
  'returned by a handler with tasks': (query, request) => {
    request.backgroundTasks.addTask(() => {})
    return query
  },
  'returned by an async handler with tasks': async (query, request) => {
    request.backgroundTasks.addTask(() => {})
    return await query
  },
  'returned by a handler without any': query => query
}
for (const [name, handler] of Object.entries(handlers)) {
  for (const leaves of [false, true]) {
    t.test(`a lazy thenable ${name} runs once, ${leaves ? 'and its exchange ends after the client has left' : 'and is the reply'}`, async t => {
      const { app, address } = await start(t)
      const [entered, gate, left, ran] = [deferred(), deferred(), deferred(), deferred()]
      const query = new Query(async () => {
        entered.resolve()
        await gate.promise
        request?.backgroundTasks.addTask(() => { ran.resolve() })
        return 'rows'
      })
      let request: FastifyRequest | undefined
      app.get('/', (_request, reply) => {
        request = _request
        reply.raw.on('close', left.resolve)
        return handler(query, _request)
      })
      const client = http.get(await address()).on('error', () => {})
      await entered.promise
      if (leaves) {
        client.destroy()
        await left.promise
        gate.resolve()
      } else {
        gate.resolve()
        const [response] = await once(client, 'response') as [http.IncomingMessage]
        t.equal(String(await response.setEncoding('utf8').reduce((all, part) => String(all) + String(part), '')), 'rows')
      }
      await ran.promise
      await app.backgroundTasks.idle()
      t.equal(query.calls.length, 1)
      t.match(request?.backgroundTasks.outcome, { failed: false, aborted: leaves })
    })
  }
}

t.test('a thenable settles once, as it said first, whatever it does then', async t => {
  const faults = watchFaults(t)
  const { app } = await start(t)
  type Settle = (value?: unknown) => void
  const add = (then: (resolve: Settle, reject: Settle) => unknown): BackgroundTask => app.backgroundTasks.addTask(() => ({ then }))
  const nested = new Query()
  const tasks = {
    succeeded: [
      add(resolve => { resolve(); throw new Error('then') }),
      add((resolve, reject) => { resolve(); reject(new Error('then')); resolve() }),
      add(resolve => { resolve(nested) }),
      add(resolve => { resolve(); return Promise.resolve('nobody asks for it') }),
      app.backgroundTasks.addTask(() => Object.assign(Promise.resolve(), { then: 'no function' })),
      app.backgroundTasks.addTask(() => ({ then: 'no function' }))
    ],
    failed: [
      add(() => { throw new Error('then') }),
      add((_, reject) => { reject(); throw new Error('then') }),
      add((_, reject) => { setImmediate(reject, new Error('then')) }),
      add(resolve => { resolve({ get then () { throw new Error('then') } }) }),
      app.backgroundTasks.addTask(() => ({ get then () { throw new Error('then') } })),
      app.backgroundTasks.addTask(() => new Proxy(Promise.resolve(), {})),
      app.backgroundTasks.addTask(() => new Proxy({}, { getPrototypeOf () { throw new Error('no prototype') }, get () { throw new Error('no property') } }))
    ]
  }
  await app.backgroundTasks.idle()
  await turn()
  for (const [state, all] of Object.entries(tasks)) t.strictSame(all.map(task => task.state), all.map(() => state))
  t.equal(nested.calls.length, 1)
  t.match(app.backgroundTasks.stats, { succeeded: tasks.succeeded.length, failed: tasks.failed.length, pending: 0, running: 0 })
  t.strictSame(faults, [])
})

t.test('a subclass of Promise, and a promise of another realm, are waited for', async t => {
  const { app } = await start(t)
  let thens = 0
  class Lazy<T> extends Promise<T> {
    override then<A = T, B = never> (resolve?: ((value: T) => A | PromiseLike<A>) | null, reject?: ((reason: unknown) => B | PromiseLike<B>) | null): Promise<A | B> {
      thens++
      return super.then(resolve, reject)
    }
  }
  const ran: string[] = []
  app.get('/', async request => {
    const { backgroundTasks: tasks } = request
    tasks.addTask(() => new Lazy<void>(resolve => { setImmediate(() => { ran.push('subclass'); resolve() }) }))
    tasks.addTask(vm.runInNewContext('async (turn, ran) => { await turn(); ran.push("realm") }') as (...args: unknown[]) => unknown, turn, ran)
    tasks.addTask(() => { ran.push('next') })
    return 'ok'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['subclass', 'realm', 'next'])
  t.equal(thens, 1)
})

/** Promises, and things like them, that a function may return where it is asked synchronously. */
const promises: Record<string, () => unknown> = {
  'a promise that rejects': async () => { throw new Error('later') },
  'a promise that resolves': async () => true,
  'a promise of another realm that rejects': vm.runInNewContext('async () => { throw new Error("later") }') as () => unknown,
  'a lazy thenable': () => new Query(fails)
}
for (const [name, answer] of Object.entries(promises)) {
  t.test(`${name} is no answer: the task of that \`when\`, or \`retry.when\`, fails with words, and the process hears nothing`, async t => {
    const faults = watchFaults(t)
    const asked: unknown[] = []
    const ask = (): boolean => {
      const promise = answer()
      asked.push(promise)
      return promise as boolean
    }
    let attempts = 0
    const options = { retry: { attempts: 3, backoff: { delay: 0 }, when: ask }, handler () { attempts++; throw new Error('attempt') } }
    const [flaky, conditional] = [defineTask({ name: 'flaky', ...options }), defineTask({ name: 'conditional', ...options, when: ask })]
    const errors: Array<[string, unknown]> = []
    const { app } = await start(t, { tasks: [flaky, conditional], onError: (error, task) => { errors.push([task.name, error]) } })
    const tasks: BackgroundTask[] = []
    let ran = false
    app.get('/', async ({ backgroundTasks }) => {
      tasks.push(
        backgroundTasks.with({ when: ask, name: 'function' }).addTask(() => {}),
        backgroundTasks.addTask(flaky),
        backgroundTasks.addTask(conditional)
      )
      backgroundTasks.addTask(() => { ran = true })
      return 'ok'
    })
    await app.inject('/')
    await app.backgroundTasks.idle()
    await turn()
    t.match(errors, [
      ['function', { message: /`when`.*"function" returned a promise/ }],
      ['flaky', { message: /retry\.when.*"flaky" returned a promise/, cause: { message: 'attempt' } }],
      ['conditional', { message: /`when`.*"conditional" returned a promise/ }]
    ])
    t.strictSame(tasks.map(task => task.state), ['failed', 'failed', 'failed'])
    t.equal(attempts, 1)
    t.ok(ran)
    t.match(app.backgroundTasks.stats, { failed: 3, succeeded: 1, pending: 0, running: 0 })
    for (const query of asked) if (query instanceof Query) t.strictSame(query.calls, [], 'nobody asked for its rows')
    t.strictSame(faults, [])
  })

  t.test(`${name} of waitUntil is caught, and its rejection logged`, async t => {
    const faults = watchFaults(t)
    const { app, logs } = await start(t, { waitUntil: answer as () => void })
    let ran = false
    app.get('/', async ({ backgroundTasks }) => {
      backgroundTasks.addTask(() => { ran = true })
      return 'ok'
    })
    t.equal((await app.inject('/')).statusCode, 200)
    await app.backgroundTasks.idle()
    for (let i = 0; i < 3; i++) await turn()
    t.ok(ran)
    t.equal(logs.filter(line => line.msg.startsWith('waitUntil failed')).length, name === 'a promise that resolves' ? 0 : 1)
    t.strictSame(faults, [])
  })
}
