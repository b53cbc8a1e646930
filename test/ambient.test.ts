/** `fastify-background-tasks/ambient`: code that is not handed the request finds its list, and never that of another request. */
import { AsyncLocalStorage } from 'node:async_hooks'
import { EventEmitter, once } from 'node:events'
import { Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import websocket from '@fastify/websocket'
import Fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify'
import t from 'tap'
import { WebSocket } from 'ws'
import { addTask, requestTasks } from '../lib/ambient.js'
import { carryRequest } from '../lib/exchange/carry-request.js'
import backgroundTasks, { BackgroundTask, defineTask } from '../lib/index.js'
import { recordTasks } from '../lib/testing.js'
import { deferred, start } from './support/app.js'
import { beforeFastify } from './support/fastify-version.js'
import { build, connectRaw, listen, requestText, transports } from './support/sockets.js'
import { StubEngine } from './support/stub-engine.js'

/** Whose list code finds: the `x-id` header of the request, by the list. */
const owners = new WeakMap<object, string>()
const owner = (): string => owners.get(requestTasks() ?? owners) ?? 'none'
const own = (request: FastifyRequest): void => { owners.set(request.backgroundTasks, String(request.headers['x-id'])) }

/** Notes, for each place where code of a request runs, whose list it finds there. */
class Places {
  readonly #found = new Map<string, Map<string, string>>()

  note (request: FastifyRequest, place: string): void {
    const id = String(request.headers['x-id'])
    if (!this.#found.has(id)) this.#found.set(id, new Map())
    this.#found.get(id)?.set(place, owner())
  }

  of (id: string): Map<string, string> {
    return this.#found.get(id) ?? new Map()
  }
}

function addPlaces (app: FastifyInstance, places: Places): void {
  app.addHook('onRequest', async request => { own(request); places.note(request, 'onRequest') })
  app.addHook('preParsing', (request, _reply, payload, done) => {
    places.note(request, 'preParsing')
    done(null, payload)
  })
  for (const hook of ['preValidation', 'preHandler'] as const) app.addHook(hook, async request => { places.note(request, hook) })
  for (const hook of ['preSerialization', 'onSend'] as const) app.addHook(hook, async request => { places.note(request, hook) })
  app.addHook('onError', async request => { places.note(request, 'onError') })
  app.addHook('onResponse', async request => { places.note(request, 'onResponse') })
  app.addHook('onRequestAbort', async request => { places.note(request, 'onRequestAbort') })
  app.setErrorHandler(async (_error, request, reply) => {
    places.note(request, 'error handler')
    await reply.code(500).send('failed')
  })
  app.setNotFoundHandler(async (request, reply) => {
    places.note(request, 'not-found handler')
    await reply.code(404).send('not found')
  })
  app.addContentTypeParser('text/lines', (request, payload, done) => {
    payload.on('data', () => { places.note(request, 'listener of the body') })
    payload.on('end', () => { done(null, 'parsed') })
  })
  app.post('/', async (request, reply) => {
    places.note(request, 'handler')
    reply.raw.on('finish', () => { places.note(request, 'listener of the response') })
    await sleep(1)
    places.note(request, 'after an await')
    request.backgroundTasks.addTask(() => { places.note(request, 'task') })
    request.backgroundTasks.addTask(async () => { await sleep(1); places.note(request, 'after an await of a task') })
    request.backgroundTasks.addCleanup(() => { places.note(request, 'cleanup') })
    return { ok: true }
  })
  app.post('/stream', (request, reply) => {
    const body = Readable.from(['one', 'two'])
    body.on('end', () => { places.note(request, 'listener of a body stream') })
    void reply.send(body)
  })
  app.post('/fails', async () => { throw new Error('no') })
  // Code that has nothing of the request replies: a pool that was opened at boot.
  const waiting: FastifyReply[] = []
  const pool = setInterval(() => { for (const reply of waiting.splice(0)) void reply.send('by a pool') }, 1)
  app.addHook('onClose', async () => { clearInterval(pool) })
  app.post('/pool', (_request, reply) => { waiting.push(reply) })
}

for (const [protocol, { server, connect }] of Object.entries(transports)) {
  if (protocol === 'HTTPS') continue
  t.test(`${protocol}: every place that runs for a request finds its list, on one connection and at the same time`, async t => {
    const places = new Places()
    const app = await build(t, server, { ambient: true })
    addPlaces(app, places)
    const client = await connect(t, app)
    const expected: Record<string, string[]> = {
      '/': ['onRequest', 'preParsing', 'preValidation', 'preHandler', 'handler', 'after an await', 'preSerialization', 'onSend', 'listener of the response', 'onResponse', 'task', 'after an await of a task', 'cleanup'],
      '/stream': ['listener of a body stream', 'onSend', 'onResponse'],
      '/fails': ['onError', 'error handler', 'onSend', 'onResponse'],
      '/unknown': ['not-found handler', 'onSend', 'onResponse'],
      '/pool': ['onSend', 'onResponse']
    }
    const ids: Array<[id: string, path: string]> = []
    for (const round of [1, 2, 3]) {
      await Promise.all(Object.keys(expected).map(async path => {
        const id = `${path} ${round}`
        ids.push([id, path])
        const { body } = await client.send(path, 'POST', 'a body', { 'x-id': id }).answer
        await body.resume().toArray()
      }))
    }
    // The hooks of the end of a response run after its client has it.
    const isDone = (id: string, path: string): boolean => (expected[path] ?? []).every(place => places.of(id).has(place))
    while (!ids.every(([id, path]) => isDone(id, path))) await sleep(5)
    const wrong = ids.flatMap(([id]) => Array.from(places.of(id)).filter(([, found]) => found !== id).map(([place, found]) => `${place} of ${id} finds ${found}`))
    t.strictSame(wrong, [])
    t.equal(owner(), 'none', 'and the test itself finds none')
  })
}

t.test('inject, a body that a parser reads, and an abort', async t => {
  const places = new Places()
  const app = await build(t, {}, { ambient: true })
  addPlaces(app, places)
  const aborted = deferred()
  app.addHook('onRequestAbort', async _request => { aborted.resolve() })
  app.get('/waits', async () => { await aborted.promise })
  await app.inject({ method: 'POST', url: '/', headers: { 'x-id': 'injected', 'content-type': 'text/lines' }, payload: 'a\nb' })
  t.strictSame([...new Set(places.of('injected').values())], ['injected'])
  t.ok(places.of('injected').has('listener of the body'))
  const socket = await connectRaw(t, app)
  socket.write(requestText('/', 'POST', 'x').replace('text/plain', 'text/lines').replace('host', 'x-id: real\r\nhost'))
  await once(socket, 'data')
  await app.backgroundTasks.idle()
  t.strictSame([...new Set(places.of('real').values())], ['real'])
  t.equal(places.of('real').get('listener of the body'), 'real')
  socket.write(requestText('/waits').replace('host', 'x-id: gone\r\nhost'))
  while (!places.of('gone').has('preHandler')) await sleep(1)
  socket.destroy()
  await aborted.promise
  t.equal(places.of('gone').get('onRequestAbort'), 'gone')
})

t.test('timeouts: onTimeout of a connection, and the 503 of a handlerTimeout', { skip: beforeFastify('5.8.0', 'it has no handlerTimeout') }, async t => {
  const places = new Places()
  const app = await build(t, { connectionTimeout: 50 }, { ambient: true })
  addPlaces(app, places)
  const timedOut = deferred()
  app.addHook('onTimeout', async request => {
    places.note(request, 'onTimeout')
    timedOut.resolve()
  })
  app.post('/hangs', () => {})
  app.post('/slow', { handlerTimeout: 10 }, () => {})
  const socket = await connectRaw(t, app)
  socket.write(requestText('/hangs', 'POST', 'x').replace('host', 'x-id: hangs\r\nhost'))
  await timedOut.promise
  t.equal(places.of('hangs').get('onTimeout'), 'hangs')
  t.equal((await app.inject({ method: 'POST', url: '/slow', headers: { 'x-id': 'slow' } })).statusCode, 500)
  for (const place of ['onError', 'error handler', 'onSend']) t.equal(places.of('slow').get(place), 'slow', place)
})

t.test('where a connection that another request has opened calls back, the hooks that follow, the handler and the serializer find their list', async t => {
  const found: string[] = []
  const app = await build(t, {}, { ambient: true })
  const note = (request: FastifyRequest, place: string): void => { found.push(`${String(request.headers['x-id'])}: ${place} ${owner()}`) }
  app.addHook('onRequest', async request => { own(request) })
  const waiting: Array<() => void> = []
  let connection: NodeJS.Timeout | undefined
  const callBack = (fn: () => void): void => {
    waiting.push(fn)
    connection ??= setInterval(() => { for (const fn of waiting.splice(0)) fn() }, 1)
  }
  t.teardown(() => { clearInterval(connection) })
  const phases = ['onRequest', 'preParsing', 'preValidation', 'preHandler', 'preSerialization', 'onSend'] as const
  for (const phase of phases) app.addHook(phase as 'preHandler', async request => { note(request, phase) })
  for (const phase of phases) {
    // Each hook calls back from the context of the first request, and the places of the next phase are noted.
    const hook = (...args: unknown[]): void => { callBack(args.at(-1) as () => void) }
    // Fastify calls a hook by the number of its parameters.
    const hasPayload = phase === 'preParsing' || phase === 'preSerialization' || phase === 'onSend'
    app.get(`/${phase}`, { [phase]: Object.defineProperty(hook, 'length', { value: hasPayload ? 4 : 3 }) }, async request => {
      note(request, 'handler')
      return {}
    })
  }
  app.get('/reply', (request, reply) => {
    reply.serializer(() => {
      note(request, 'serializer')
      return 'done'
    })
    callBack(() => { void reply.send({}) })
  })
  await app.inject({ url: '/reply', headers: { 'x-id': 'first' } })
  await Promise.all(['/reply', ...phases.map(phase => `/${phase}`)].map(url => app.inject({ url, headers: { 'x-id': url } })))
  t.equal(found.length, 7 + 7 + 6 * 7)
  t.strictSame(found.filter(line => !line.endsWith(` ${line.split(':')[0] as string}`)), [])
})

t.test('whatever a hook leaves behind, the parser, the validator, the handler, the serializer and the error handler find their list', async t => {
  const found: string[] = []
  const app = await build(t, {}, { ambient: true })
  await app.register(websocket)
  const note = (place: string): void => { found.push(`${place} ${owner()}`) }
  app.addHook('onRequest', async request => { own(request) })
  const waiting: Array<() => void> = []
  let connection: NodeJS.Timeout | undefined
  const callBack = (done: () => void): void => {
    waiting.push(done)
    connection ??= setInterval(() => { for (const done of waiting.splice(0)) done() }, 1)
  }
  t.teardown(() => { clearInterval(connection) })
  const leaves = (_request: unknown, _reply: unknown, done: () => void): void => { callBack(done) }
  const leavesWith = (_request: unknown, _reply: unknown, _value: unknown, done: () => void): void => { callBack(done) }
  const hooks = { preParsing: leavesWith, preValidation: leaves, preHandler: leaves, preSerialization: leavesWith, onError: leavesWith }
  app.addContentTypeParser('text/plain', (_request: unknown, body: Readable, done: (error: null, body: string) => void) => {
    note('parser')
    body.on('end', () => { done(null, '') }).resume()
  })
  app.post('/places', {
    ...hooks,
    schema: { body: {} },
    validatorCompiler: () => () => { note('validator'); return true },
    errorHandler: (_error, _request, reply) => { note('error handler'); void reply.code(500).send() }
  }, async (request, reply) => {
    note('handler')
    reply.serializer(() => { note('serializer'); return '' })
    if (request.headers['x-id'] === 'fails') throw new Error('fails')
    return {}
  })
  const task = (): void => { note('task') }
  app.get('/socket', { websocket: true, ...hooks }, socket => {
    note('socket')
    addTask(task)
    socket.close()
  })
  app.get('/fails', { preHandler: leaves }, async () => { throw new Error('fails') })

  await app.inject({ url: '/fails', headers: { 'x-id': 'first' } })
  const post = async (id: string): Promise<void> => { await app.inject({ method: 'POST', url: '/places', headers: { 'x-id': id, 'content-type': 'text/plain' }, payload: 'text' }) }
  await Promise.all([post('works'), post('fails')])
  const client = new WebSocket(`ws://127.0.0.1:${await listen(app)}/socket`, { headers: { 'x-id': 'socket' } })
  await once(client, 'close')
  await app.backgroundTasks.idle()
  t.strictSame(found.sort(), [
    ...['works', 'fails'].flatMap(id => ['parser', 'validator', 'handler'].map(place => `${place} ${id}`)),
    'serializer works', 'error handler fails', 'socket socket', 'task socket'
  ].sort())
})

t.test('a connection that is upgraded has served another request before: its timeout belongs to the last one', async t => {
  const found: string[] = []
  const app = await build(t, { connectionTimeout: 500 }, { ambient: true })
  await app.register(websocket)
  app.addHook('onRequest', async request => { own(request) })
  const timedOut = deferred()
  app.addHook('onTimeout', async () => { found.push(owner()); timedOut.resolve() })
  app.get('/', async () => 'plain')
  app.get('/socket', { websocket: true, preHandler: async () => { await timedOut.promise; throw new Error('too late') } }, () => {})
  const socket = await connectRaw(t, app)
  socket.write(requestText('/').replace('host', 'x-id: plain\r\nhost'))
  await once(socket, 'data')
  socket.write('GET /socket HTTP/1.1\r\nhost: localhost\r\nx-id: socket\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n')
  await timedOut.promise
  t.strictSame(found, ['socket'])
})

t.test('a copy of a raw request emits as any other object', async t => {
  const found: unknown[] = []
  const app = await build(t, {}, { ambient: true })
  app.get('/', async request => {
    const { emit } = request.raw as { emit: EventEmitter['emit'] }
    const other = new EventEmitter().on('event', value => { found.push(value) })
    emit.call(other, 'event', 'borrowed')
    const { emit: emitOfConnection } = request.raw.socket as { emit: EventEmitter['emit'] }
    emitOfConnection.call(other, 'event', 'of the connection')
  })
  await fetch(`http://127.0.0.1:${await listen(app)}/`)
  t.strictSame(found, ['borrowed', 'of the connection'])
})

t.test('all our hooks have names', async t => {
  const app = Fastify()
  const names: string[] = []
  const { addHook } = app
  app.addHook = function (this: FastifyInstance, name: string, hook: (...args: never[]) => unknown) {
    names.push(hook.name)
    return addHook.call(this, name as 'onRequest', hook as never)
  } as typeof addHook
  await app.register(backgroundTasks, { ambient: true })
  t.ok(names.length >= 7)
  t.strictSame(names.filter(name => !name.startsWith('backgroundTasks')), [])
})

t.test('WebSocket handlers and their listeners, over injectWS', async t => {
  const found: boolean[] = []
  const app = await build(t, {}, { ambient: true })
  await app.register(websocket)
  const closed = deferred()
  app.get('/', { websocket: true }, (socket, request) => {
    const note = (): void => { found.push(requestTasks() === request.backgroundTasks) }
    note()
    socket.on('message', () => {
      note()
      socket.send('seen')
    })
    socket.on('close', () => {
      note()
      closed.resolve()
    })
  })
  await app.ready()
  const client = await app.injectWS('/')
  client.send('hello')
  await once(client, 'message')
  client.terminate()
  await closed.promise
  t.strictSame(found, [true, true, true])
})

t.test('WebSocket handlers and their listeners', async t => {
  const found: string[] = []
  const app = await build(t, {}, { ambient: true })
  await app.register(websocket)
  app.addHook('onRequest', async request => { own(request) })
  const closed = deferred()
  app.get('/', { websocket: true }, socket => {
    found.push(`handler ${owner()}`)
    socket.on('message', message => {
      found.push(`message ${owner()}`)
      addTask((text: string) => { found.push(`task ${text} ${owner()}`) }, String(message))
      socket.send('seen')
    })
    socket.on('close', () => {
      found.push(`close ${owner()}`)
      closed.resolve()
    })
  })
  const port = await listen(app)
  const clients = await Promise.all(['a', 'b'].map(async id => {
    const client = new WebSocket(`ws://127.0.0.1:${port}/`, { headers: { 'x-id': id } })
    await once(client, 'open')
    client.send(`of ${id}`)
    await once(client, 'message')
    return client
  }))
  for (const client of clients) client.close()
  await closed.promise
  while (found.length < 8) await sleep(1)
  t.strictSame(found.sort(), ['a', 'b'].flatMap(id => ['close', 'handler', 'message', `task of ${id}`].map(what => `${what} ${id}`)).sort())
})

t.test('a task has the list of its request, wherever it was added from, and whichever store it restores', async t => {
  const found: string[] = []
  const other = new AsyncLocalStorage<string>()
  const definition = defineTask({ name: 'definition', retry: { attempts: 2, backoff: { delay: 1 } }, handler (_, { attempt }) { found.push(`definition ${owner()}`); if (attempt === 1) throw new Error('again') } })
  const app = await build(t, {}, { ambient: true, tasks: [definition] })
  const requests = new Map<string, FastifyRequest>()
  const [both, added] = [deferred(), deferred()]
  app.get('/', async request => {
    own(request)
    requests.set(String(request.headers['x-id']), request)
    if (requests.size === 2) both.resolve()
    await both.promise
    if (request.headers['x-id'] === 'b') return await added.promise
    // The request "a" adds tasks to the list of "b".
    const { backgroundTasks } = requests.get('b') as FastifyRequest
    other.run('kept', () => {
      backgroundTasks.addTask(() => { found.push(`function ${owner()} ${String(other.getStore())}`) })
      backgroundTasks.addTask(new BackgroundTask(() => { found.push(`made ${owner()}`) }))
      backgroundTasks.addTask(definition, null)
      backgroundTasks.addCleanup(() => { found.push(`cleanup ${owner()}`) })
      app.backgroundTasks.addTask(() => { found.push(`app ${owner()}`) })
      void app.backgroundTasks.enqueue(definition, null)
    })
    added.resolve()
  })
  await Promise.all(['a', 'b'].map(id => app.inject({ url: '/', headers: { 'x-id': id } })))
  await app.backgroundTasks.idle()
  t.strictSame(found.sort(), [
    'app none', 'cleanup b', ...Array(2).fill('definition b'), ...Array(2).fill('definition none'), 'function b kept', 'made b'
  ])
})

t.test('outside a request there is none, and the error says what to do', async t => {
  const refused = { code: 'FST_BGT_NO_REQUEST', statusCode: 500, message: /app\.backgroundTasks\.addTask.*ambient: true/ }
  t.throws(() => addTask(() => {}), refused)
  const off = await build(t)
  off.get('/', async () => {
    t.equal(requestTasks(), undefined)
    addTask(() => {})
  })
  const reply = await off.inject('/')
  t.match([reply.statusCode, reply.json()], [500, { code: 'FST_BGT_NO_REQUEST' }])

  const engine = new StubEngine()
  const found: string[] = []
  const job = defineTask({ name: 'job', handler () { found.push(owner()) } })
  const { app } = await start(t, { tasks: [job], engine, ambient: true })
  app.get('/', async request => {
    own(request)
    // An engine may deliver from code that a request has started.
    return { state: await engine.deliver({ task: 'job' }) }
  })
  const timed: string[] = []
  const timer = setInterval(() => { timed.push(owner()) }, 1)
  await app.inject({ url: '/', headers: { 'x-id': 'a' } })
  while (timed.length === 0) await sleep(1)
  clearInterval(timer)
  t.equal(timed[0], 'none', 'a timer of the app')
  t.strictSame(found, ['none'], 'a job that an engine has delivered')
})

t.test('each registration has its own lists, a failing addTask fails as that of the request, and a recording sees the tasks', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  const tasks = recordTasks(app)
  const service = (name: string): void => { addTask(function send (to: string) { void to }, name) }
  for (const path of ['/one', '/two']) {
    await app.register(async child => {
      await child.register(backgroundTasks, { ambient: true, maxPending: 1 })
      child.get(path, async request => {
        service(path)
        t.equal(requestTasks(), request.backgroundTasks)
        t.equal(request.backgroundTasks.length, 1)
        t.throws(() => { service('too many') }, { code: 'FST_BGT_OVERLOADED' })
        t.throws(() => addTask('text' as never), { code: 'FST_BGT_INVALID_TASK' })
      })
    })
  }
  t.equal((await app.inject('/one')).statusCode, 200)
  t.equal((await app.inject('/two')).statusCode, 200)
  t.match(tasks.added, [{ name: 'send', args: ['/one'] }, { name: 'send', args: ['/two'] }])
})

t.test('a raw request that nobody may change is served all the same', async t => {
  const app = await build(t, {}, { ambient: true })
  const found: string[] = []
  app.addHook('onRequest', async request => { own(request); Object.freeze(request.raw) })
  app.get('/', async () => { addTask(() => { found.push(owner()) }) })
  t.equal((await app.inject({ url: '/', headers: { 'x-id': 'a' } })).statusCode, 200)
  await app.backgroundTasks.idle()
  t.strictSame(found, ['a'])
})

t.test('stand-ins that emit nothing, and emitters that are frozen, are left alone', async t => {
  const frozen = Object.freeze(new EventEmitter())
  carryRequest({ raw: frozen } as unknown as FastifyRequest, { raw: frozen } as unknown as FastifyReply)
  t.notOk(Object.hasOwn(frozen, 'emit'))

  const standIns: Array<[raw: object, response: object]> = [
    [{ httpVersionMajor: 1, socket: {} }, {}],
    [{ upgrade: true }, {}]
  ]
  for (const [raw, response] of standIns) {
    carryRequest({ raw } as unknown as FastifyRequest, { raw: response } as unknown as FastifyReply)
    t.strictSame([Object.hasOwn(raw, 'emit'), Object.hasOwn(response, 'emit')], [false, false])
  }
})

t.test('of several requests that Fastify makes of one raw request, the last one counts', async t => {
  const [raw, response] = [new EventEmitter(), new EventEmitter()]
  const requests = ['first', 'last'].map(id => ({ raw, id, backgroundTasks: { id } }) as unknown as FastifyRequest)
  for (const request of requests) carryRequest(request, { raw: response } as unknown as FastifyReply)
  const found: unknown[] = []
  raw.on('data', text => { found.push(text, requestTasks()) })
  raw.emit('data', 'text')
  t.strictSame(found, ['text', { id: 'last' }], 'its listener is called once')
})
