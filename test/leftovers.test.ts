/** What has ended leaves nothing behind: no error, closure, listener, logger, request or timer; and what goes on does not grow. */
import t from 'tap'
import { AsyncLocalStorage } from 'node:async_hooks'
import { once } from 'node:events'
import net from 'node:net'
import { setImmediate as turn, setTimeout as sleep } from 'node:timers/promises'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import backgroundTasks, { BackgroundTask, defineTask, type FastifyBackgroundTasksOptions } from '../lib/index.js'
import { deferred, start } from './support/app.js'
import { watchWarnings } from './support/faults.js'
import { StubEngine } from './support/stub-engine.js'

const needsGc = { skip: globalThis.gc === undefined && 'needs --expose-gc' }

/** Objects by what they are for, and whether anything holds them still. */
class Refs {
  readonly #refs: Array<[kind: string, ref: WeakRef<object>]> = []

  add<T extends object> (kind: string, value: T): T {
    this.#refs.push([kind, new WeakRef(value)])
    return value
  }

  /** A new object. */
  make (kind: string): { big: unknown[] } {
    return this.add(kind, { big: new Array(100) })
  }

  /** How many of each kind are held, once V8 has let go of what it keeps for the current job. */
  async held (): Promise<Record<string, number>> {
    await collect()
    const held: Record<string, number> = {}
    for (const [kind, ref] of this.#refs) if (ref.deref() !== undefined) held[kind] = (held[kind] ?? 0) + 1
    return held
  }

  get size (): number {
    return this.#refs.length
  }
}

async function collect (): Promise<void> {
  for (let i = 0; i < 6; i++) {
    await turn()
    globalThis.gc?.()
  }
}

t.test('nobody holds what has ended, though nobody calls idle(), the tasks are held, and one list never ends', needsGc, async t => {
  const refs = new Refs()
  const tasks: BackgroundTask[] = []
  const never = deferred()
  const storage = new AsyncLocalStorage<object>()
  const ref = <T extends object> (kind: string, value: T): T => refs.add(kind, value)
  const plain = defineTask({
    name: 'plain',
    handler (_, { signal, log }) {
      const listened = refs.make('listener of a signal')
      signal.addEventListener('abort', () => listened)
      ref('logger', log)
      return { fresh: true }
    }
  })
  const failing = defineTask({
    name: 'failing', retry: { attempts: 2, backoff: { delay: 1 } }, handler (_payload: object) { throw ref('error of an attempt', new Error('x')) }, onFailed () {}
  })
  const { app } = await start(t, { tasks: [plain, failing], timeout: 60_000, slowTask: 60_000, onError: () => {}, waitUntil: promise => { ref('promise of waitUntil', promise) } })
  app.get('/', async (request, reply) => {
    ref('request', request)
    ref('reply', reply)
    ref('list', request.backgroundTasks)
    const { backgroundTasks: list } = request
    const keep = (task: BackgroundTask): void => { tasks.push(task) }
    storage.run(refs.make('store'), () => {
      const [fn, when, cleanup] = [refs.make('closure'), refs.make('when'), refs.make('cleanup')]
      // As axios does: an error that holds a response.
      keep(list.addTask(ref('function', () => { throw ref('error', Object.assign(new Error('x'), { request, fn })) })))
      keep(list.addTask(async (_: object) => { await turn(); throw ref('error', new Error('x')) }, refs.make('argument')))
      keep(list.with({ when: ref('condition', () => when.big.length > 0) }).addTask(plain))
      keep(list.with({ when: () => { throw ref('error of a when', Object.assign(new Error('x'), { when })) } }).addTask(() => {}))
      keep(list.with({ when: 'error' }).addTask(ref('function', (_: object) => {}), refs.make('argument')))
      keep(list.addTask(failing, refs.make('payload')))
      const aborting = list.with({ timeout: 1 }).addTask(async () => {
        const listened = refs.make('listener of a task')
        aborting.signal.addEventListener('abort', () => listened)
        ref('signal', aborting.signal)
        await once(aborting.signal, 'abort')
      })
      keep(aborting)
      const cancelled = list.addTask((_: object) => {}, refs.make('argument'))
      ref('signal', cancelled.signal)
      cancelled.cancel()
      keep(cancelled)
      list.addCleanup(ref('function', () => { throw ref('error of a cleanup', Object.assign(new Error('x'), { cleanup })) }))
    })
    return ref('returned', { rows: [] })
  })
  app.backgroundTasks.addTask(async () => { await never.promise })
  for (let i = 0; i < 5; i++) await app.inject('/')
  while (app.backgroundTasks.length > 1) await turn()
  await sleep(5)
  t.strictSame(await refs.held(), {}, `of ${refs.size}`)
  t.equal(tasks.length, 8 * 5)
  t.match(app.backgroundTasks.stats, { failed: 25, succeeded: 5, skipped: 10, running: 1, pending: 0 })
  never.resolve()
  const rejected = await app.backgroundTasks.idle({ rejectOnFailure: true }).catch((error: AggregateError) => error)
  t.match(rejected, { errors: { length: 25 } }, 'what they failed with is said all the same')
})

t.test('nobody holds what a handler returned while the tasks of its request run', needsGc, async t => {
  const refs = new Refs()
  const { app, get } = await start(t)
  const [gate, started] = [deferred(), deferred()]
  const add = (request: FastifyRequest): void => {
    request.backgroundTasks.addTask(async () => { started.resolve(); await gate.promise })
  }
  app.get('/async', async request => { add(request); return refs.make('object') })
  app.get('/sync', (request, reply) => { add(request); void reply.send(refs.make('sent')) })
  app.get('/promise', request => {
    add(request)
    return refs.add('promise', Promise.resolve(refs.make('value of a promise')))
  })
  app.get('/thenable', request => {
    add(request)
    return refs.add('thenable', { then: (resolve: (value: object) => void) => { resolve(refs.make('value of a thenable')) } })
  })
  for (const path of ['/async', '/sync', '/promise', '/thenable']) {
    await get(path)
    await app.inject(path)
  }
  await started.promise
  t.strictSame(await refs.held(), {})
  t.equal(app.backgroundTasks.length, 8)
  gate.resolve()
})

t.test('a record of a task holds no closure, signal or logger, whatever was done to it on an engine', needsGc, async t => {
  const refs = new Refs()
  const engine = new StubEngine()
  const job = defineTask({
    name: 'job',
    retry: { attempts: 1 },
    async handler (payload, { signal, log }) {
      refs.add('signal', signal)
      refs.add('logger', log)
      const listened = refs.make('listener')
      signal.addEventListener('abort', () => listened)
      if (payload === 'fails') throw refs.add('error', new Error('x'))
    }
  })
  const { app } = await start(t, { tasks: [job], engine })
  const tasks: BackgroundTask[] = []
  app.get('/', async request => {
    const when = refs.make('when')
    refs.add('request', request)
    tasks.push(request.backgroundTasks.with({ when: () => when.big.length > 0 }).addTask(job))
    return 'ok'
  })
  for (let i = 0; i < 3; i++) {
    await app.inject('/')
    await engine.deliver({ task: 'job', payload: 'fails', requestId: 'x' })
    await engine.deliver({ task: 'job', payload: 'ends', requestId: 'y' })
  }
  await app.backgroundTasks.idle()
  t.strictSame(tasks.map(task => task.state), ['enqueued', 'enqueued', 'enqueued'])
  t.strictSame(await refs.held(), {})
})

t.test('nobody holds what the deadline has cut off, once it has settled', needsGc, async t => {
  const refs = new Refs()
  const { app } = await start(t, { closeTimeout: 0, timeout: 60_000, slowTask: 60_000 })
  const gates: Array<() => void> = []
  const tasks: BackgroundTask[] = []
  app.get('/', async request => {
    refs.add('request', request)
    const gate = deferred()
    gates.push(gate.resolve)
    const task: BackgroundTask = request.backgroundTasks.addTask(async (_: object) => { await gate.promise }, refs.make('argument'))
    const listened = refs.make('listener')
    refs.add('signal', task.signal).addEventListener('abort', () => listened)
    tasks.push(task, request.backgroundTasks.addTask((_: object) => {}, refs.make('argument')))
    return 'ok'
  })
  for (let i = 0; i < 3; i++) await app.inject('/')
  while (app.backgroundTasks.stats.running < 3) await turn()
  await app.close()
  while (gates.length > 0) gates.pop()?.()
  t.strictSame(tasks.map(task => task.state), tasks.map(() => 'abandoned'))
  t.strictSame(await refs.held(), {})
})

/** Puts a method in the place of one of all arrays, for the time of the work. */
async function withArrayMethod (name: ArrayMethod, wrap: (original: Untyped) => Untyped, work: () => Promise<unknown>): Promise<void> {
  const original = Array.prototype[name] as Untyped
  const put = (value: Untyped): void => { Reflect.defineProperty(Array.prototype, name, { value, configurable: true, writable: true }) }
  put(wrap(original))
  try {
    await work()
  } finally {
    put(original)
  }
}

type Untyped = (this: unknown, ...args: unknown[]) => unknown
type ArrayMethod = 'push' | 'shift' | 'unshift' | 'splice' | 'slice' | 'indexOf' | 'includes' | 'filter' | 'concat'

t.test('a list that is never empty does not grow', async t => {
  const { app } = await start(t)
  const kinds: Record<string, (list: FastifyRequest['backgroundTasks'], next: () => unknown) => void> = {
    'a synchronous task that adds the next one': (list, next) => { list.addTask(next) },
    'an asynchronous one': (list, next) => { list.addTask(async () => { await Promise.resolve(); next() }) },
    'one that is always two ahead': (list, next) => { list.addTask(next) },
    'one that adds another and cancels it': (list, next) => {
      list.addTask(() => {}).cancel()
      list.addTask(next)
    }
  }
  let list: FastifyRequest['backgroundTasks'] | undefined
  let begin: (list: FastifyRequest['backgroundTasks']) => void = () => {}
  app.get('/', async request => {
    list = request.backgroundTasks
    begin(list)
    return 'ok'
  })
  for (const [name, step] of Object.entries(kinds)) {
    let left = 2_000
    const next = (): void => { if (left-- > 0) step(list as FastifyRequest['backgroundTasks'], next) }
    begin = list => {
      list.addTask(next)
      if (name === 'one that is always two ahead') list.addTask(next)
    }
    let longest = 0
    await withArrayMethod('push', push => function (this: unknown, ...args) {
      const length = Reflect.apply(push, this, args) as number
      if (args[0] instanceof BackgroundTask) longest = Math.max(longest, length)
      return length
    }, async () => {
      await app.inject('/')
      await app.backgroundTasks.idle()
    })
    t.ok(longest > 0 && longest < 100, `${name}: ${longest} places at most`)
  }
})

t.test('a list that waits for its reply keeps no tasks that were cancelled', needsGc, async t => {
  const { app } = await start(t)
  const refs: Array<WeakRef<object>> = []
  const ran: string[] = []
  app.get('/', async request => {
    const list = request.backgroundTasks
    list.addTask(() => { ran.push('first') })
    for (let i = 0; i < 1_000; i++) {
      const task = list.addTask(() => { ran.push('cancelled') })
      refs.push(new WeakRef(task))
      task.cancel()
    }
    list.addTask(() => { ran.push('last') })
    // The last one may be held by the stack.
    await new Promise(resolve => { setImmediate(resolve) })
    global.gc?.()
    t.ok(refs.filter(ref => ref.deref() !== undefined).length < 50, 'a few are still there')
    return { length: list.length }
  })
  t.same((await app.inject('/')).json(), { length: 2 })
  await app.backgroundTasks.idle()
  t.same(ran, ['first', 'last'])
})

t.test('a list that always has a job on its way to the engine does not grow', needsGc, async t => {
  const refs = new Refs()
  const engine = new StubEngine()
  const job = defineTask({ name: 'job', handler () {} })
  const { app } = await start(t, { tasks: [job], engine }, { disableRequestLogging: true })
  const storing: Array<() => void> = []
  engine.onEnqueue = async () => { await new Promise<void>(resolve => { storing.push(resolve) }) }
  let list: FastifyRequest['backgroundTasks'] | undefined
  app.get('/', async request => {
    list = request.backgroundTasks
    return 'ok'
  })
  await app.inject('/')
  const add = (): void => { refs.add('task', (list as FastifyRequest['backgroundTasks']).addTask(job)) }
  add()
  for (let i = 0; i < 300; i++) {
    add()
    while (storing.length < 2) await turn()
    storing.shift()?.()
    engine.stored.length = 0
    while ((list as FastifyRequest['backgroundTasks']).length > 1) await turn()
  }
  const held = await refs.held()
  t.ok((held.task ?? 0) < 150, `${held.task ?? 0} of ${refs.size} tasks are held, one of which is under way`)
  engine.onEnqueue = async () => {}
  for (const stored of storing) stored()
  await app.backgroundTasks.idle()
})

/** Elements that arrays were asked to look at or to move: what makes n times the work of n things that wait. */
async function elementsTouched (work: () => Promise<unknown>): Promise<number> {
  let touched = 0
  let all = work
  for (const name of ['shift', 'unshift', 'splice', 'slice', 'indexOf', 'includes', 'filter', 'concat'] as const) {
    const inner = all
    all = async () => {
      await withArrayMethod(name, original => function (this: unknown, ...args) {
        touched += (this as unknown[]).length
        return Reflect.apply(original, this, args)
      }, inner)
    }
  }
  await all()
  return touched
}

t.test('n lists that wait for a seat cost n, whether they run, are cancelled or are abandoned', async t => {
  const never = deferred()
  const n = 5_000
  const kinds: Record<string, (app: FastifyInstance) => Promise<void>> = {
    run: async app => { await app.backgroundTasks.idle() },
    'are abandoned': async app => { await app.close() },
    'are cancelled': async app => { for (const task of tasks) task.cancel(); await app.close() }
  }
  const tasks: BackgroundTask[] = []
  for (const [name, end] of Object.entries(kinds)) {
    const app = Fastify()
    t.teardown(() => app.close())
    await app.register(backgroundTasks, { concurrency: 1, closeTimeout: 0 })
    await app.ready()
    const touched = await elementsTouched(async () => {
      for (let i = 0; i < n; i++) tasks.push(app.backgroundTasks.addTask(async () => { if (name !== 'run') await never.promise }))
      await turn()
      await end(app)
    })
    const { pending, running, succeeded, skipped, abandoned } = app.backgroundTasks.stats
    t.strictSame({ pending, running, ended: succeeded + skipped + abandoned }, { pending: 0, running: 0, ended: n })
    t.ok(touched < 100 * n, `lists that ${name}: ${touched / n} elements for each`)
    tasks.length = 0
  }
  never.resolve()
})

t.test('a record goes when its time has come: at once with keep 0, after a second with keep 1', needsGc, async t => {
  const refs = new Refs()
  const keeps = [{ succeeded: 0, failed: 0 }, { succeeded: 1, failed: 1 }]
  const definitions = keeps.map((keep, i) => defineTask({
    name: `keep-${keep.succeeded}-${i}`, keep, retry: { attempts: 1 }, handler (fails) { if (fails === true) throw new Error('x'.repeat(1_000)); return { big: new Array(1_000) } }
  }))
  const { app } = await start(t, { tasks: definitions })
  for (const definition of definitions) {
    for (const fails of [false, true]) {
      const add = (): string => refs.add(definition.name, app.backgroundTasks.addTask(definition, fails as never)).id
      const ids = Array.from({ length: 10 }, add)
      await app.backgroundTasks.idle()
      const found = await app.backgroundTasks.get(definition, ids[0] ?? '')
      if (definition.keep.succeeded === 0) t.equal(found, undefined)
    }
  }
  t.equal((await refs.held())['keep-0-0'], undefined)
  // Not by `get`, which looks for itself.
  while ((await refs.held())['keep-1-1'] !== undefined) await sleep(50)
  t.strictSame(await refs.held(), {})
})

const activeTimers = (): number => process.getActiveResourcesInfo().filter(type => type === 'Timeout').length

t.test('no timer is left behind a task, however it has ended', async t => {
  const options: FastifyBackgroundTasksOptions = { timeout: 30_000, slowTask: 20_000, closeTimeout: 0 }
  const never = deferred()
  const delayed = defineTask({ name: 'delayed', retry: { attempts: 2, backoff: { delay: 30_000 } }, handler () { throw new Error('x') }, onFailed: async () => { await never.promise } })
  const kinds: Record<string, (tasks: FastifyRequest['backgroundTasks']) => unknown> = {
    'that has succeeded': tasks => tasks.addTask(async () => { await turn() }),
    'that has failed': tasks => tasks.addTask(async () => { await turn(); throw new Error('x') }),
    'whose thenable has failed at once': tasks => tasks.addTask(() => ({ then () { throw new Error('then') } })),
    'whose `then` cannot be read': tasks => tasks.addTask(() => ({ get then () { throw new Error('then') } })),
    'that has timed out': tasks => tasks.with({ timeout: 1 }).addTask(async () => { await never.promise }),
    'that was cancelled, delayed': tasks => tasks.addTask(delayed, undefined, { delay: 30_000 }).cancel(),
    'whose cleanup failed': tasks => { tasks.addCleanup(async () => { throw new Error('x') }) }
  }
  for (const [name, add] of Object.entries(kinds)) {
    const { app } = await start(t, { ...options, tasks: [delayed] })
    app.get('/', async request => { add(request.backgroundTasks); return 'ok' })
    await app.ready()
    const before = activeTimers()
    await app.inject('/')
    await app.backgroundTasks.idle()
    t.equal(activeTimers(), before, `one ${name}`)
  }
  const cutOff: typeof kinds = {
    'that runs': tasks => tasks.addTask(async () => { await never.promise }),
    'whose onError runs': tasks => tasks.addTask(() => { throw new Error('x') }),
    'whose onFailed runs': tasks => tasks.with({ timeout: 60_000 }).addTask(delayed),
    'that is delayed': tasks => tasks.addTask(delayed, undefined, { delay: 30_000 }),
    'whose cleanup runs': tasks => { tasks.addCleanup(async () => { await never.promise }) }
  }
  for (const [name, add] of Object.entries(cutOff)) {
    const { app, logs } = await start(t, { ...options, tasks: [delayed], onError: async () => { await never.promise } })
    app.get('/', async request => { add(request.backgroundTasks); return 'ok' })
    await app.ready()
    const before = activeTimers()
    await app.inject('/')
    for (let i = 0; i < 5; i++) await turn()
    await app.close()
    t.equal(activeTimers(), before, `one ${name} at the deadline`)
    t.notOk(logs.some(line => line.msg.includes('slow') || line.msg.includes('timeout of')), name)
  }
})

t.test('no MaxListenersExceededWarning: from pipelining, from one shared signal, from a dozen apps that close', async t => {
  const warnings = watchWarnings(t)
  const [gate, all] = [deferred(), deferred()]
  const { app, address } = await start(t)
  let running = 0
  app.get('/', async ({ backgroundTasks: tasks }) => {
    const { signal } = tasks
    tasks.addTask(async () => {
      signal.addEventListener('abort', () => {})
      if (++running === 15) all.resolve()
      await gate.promise
    })
    await turn()
    return 'ok'
  })
  const { port } = new URL(await address())
  const socket = net.connect(Number(port), '127.0.0.1').resume()
  socket.write('GET / HTTP/1.1\r\nhost: a\r\n\r\n'.repeat(15))
  await all.promise
  const apps = await Promise.all(Array.from({ length: 12 }, async () => {
    const each = Fastify()
    await each.register(backgroundTasks)
    await each.ready()
    each.backgroundTasks.addTask(async () => { await gate.promise })
    return each
  }))
  await turn()
  const closing = [app, ...apps].map(async each => { await each.close() })
  socket.destroy()
  for (let i = 0; i < 5; i++) await turn()
  gate.resolve()
  await Promise.all(closing)
  await turn()
  t.strictSame(warnings, [])
})
