/**
 * Whoever answers the request, its exchange ends once, its tasks run once and soon, with the right outcome: behind real adapters of
 * serverless platforms, in front of a store that fails, and by the many ways round Fastify's reply.
 */
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import http, { type IncomingMessage, type RequestListener, type ServerResponse } from 'node:http'
import http2, { type ServerHttp2Stream } from 'node:http2'
import { Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import { gunzipSync } from 'node:zlib'
import { configure as serverlessExpress } from '@codegenie/serverless-express'
import awsLambda from '@fastify/aws-lambda'
import compress from '@fastify/compress'
import etag from '@fastify/etag'
import staticFiles from '@fastify/static'
import { Type } from '@sinclair/typebox'
import type { FastifyInstance, FastifyReply, FastifyRequest, onSendHookHandler } from 'fastify'
import serverlessHttp from 'serverless-http'
import t, { type Test } from 'tap'
import { deferred } from './support/app.js'
import { ABORTED, bare, build, COMPLETE, connectRaw, FAILED, FAILURE, listen, requestText, turn, Witness } from './support/sockets.js'
import { StubEngine } from './support/stub-engine.js'
import { addTasks, endless, endsSoon, visit, type Answered } from './support/visits.js'
import backgroundTasks, { defineTask, type ExchangeOutcome } from '../lib/index.js'

t.setTimeout(120_000)

const withStatus = (statusCode: number): ExchangeOutcome => ({ ...COMPLETE, statusCode })

interface Result { statusCode: number, body: string }
type Lambda = (event: object, context: object) => Promise<unknown>

/** How each adapter is given the app. */
const adapters: Record<string, (app: FastifyInstance) => Lambda> = {
  '@codegenie/serverless-express': app => serverlessExpress({ app: ((request, response) => { app.routing(request, response) }) as RequestListener }) as unknown as Lambda,
  'serverless-http over app.inject': app => serverlessHttp(app as never),
  'serverless-http over the server': app => serverlessHttp(app.server as http.Server),
  'serverless-http over app.routing': app => serverlessHttp((request: IncomingMessage, response: ServerResponse) => { app.routing(request, response) }),
  '@fastify/aws-lambda': app => awsLambda(app) as Lambda,
  '@fastify/aws-lambda with a stream': app => {
    const lambda = awsLambda(app, { payloadAsStream: true })
    return async (event, context) => {
      const { meta, stream } = await lambda(event, context as never)
      return { ...meta, body: await text(stream) }
    }
  }
}

for (const [name, adapt] of Object.entries(adapters)) {
  t.test(name, async t => {
    const app = await build(t)
    const witness = new Witness()
    addTasks(app, witness)
    app.get('/value', async () => ({ ok: true }))
    app.get('/status', async (_request, reply) => reply.code(201).send('made'))
    app.get('/stream', async () => Readable.from(['one', 'two']))
    app.get('/throws', async () => { throw FAILURE })
    app.get('/hijacked', (_request, reply) => {
      reply.hijack()
      reply.raw.end('by hand')
    })
    app.get('/raw', (_request, reply) => { setImmediate(() => { reply.raw.end('by hand') }) })
    app.post('/echo', async request => request.body)
    const lambda = adapt(app)
    await app.ready()
    const event = (path: string, method: string, body?: string): object => ({
      version: '2.0',
      rawPath: path,
      rawQueryString: '',
      headers: body === undefined ? {} : { 'content-type': 'text/plain', 'content-length': String(body.length) },
      requestContext: { http: { method, path, sourceIp: '127.0.0.1' } },
      body,
      isBase64Encoded: false
    })
    for (const [path, body, outcome] of [
      ['/value', '{"ok":true}', COMPLETE], ['/status', 'made', withStatus(201)], ['/stream', 'onetwo', COMPLETE], ['/throws', /the endpoint failed/, FAILED],
      ['/hijacked', 'by hand', COMPLETE], ['/raw', 'by hand', COMPLETE], ['/nowhere', /Not Found/, withStatus(404)], ['/echo', 'hello', COMPLETE]
    ] as const) {
      const result = await lambda(path === '/echo' ? event(path, 'POST', 'hello') : event(path, 'GET'), {}) as Result
      // This adapter loses bodies without a content-length.
      if (name !== 'serverless-http over app.inject' || result.body !== '') t.match(result.body, body)
      await endsSoon(t, app, witness, outcome, path)
    }
  })
}

const job = defineTask({ name: 'job', payload: Type.String(), handler () {} })

/** An app whose engine cannot store anything. */
async function onBrokenStore (t: Test): Promise<{ app: FastifyInstance, engine: StubEngine, witness: Witness, register: () => Promise<void> }> {
  const engine = new StubEngine()
  engine.onEnqueue = async () => { throw new Error('connection refused') }
  const app = bare(t)
  return { app, engine, witness: new Witness(), register: async () => { await app.register(backgroundTasks, { tasks: [job], engine, enqueueTimeout: 100 }) } }
}

const UNAVAILABLE = { statusCode: 503, failed: true, error: { code: 'FST_BGT_ENGINE_UNAVAILABLE' }, aborted: false }

/** What a client makes of the reply: it has to be the 503, and its headers have to be true of it. */
function isReadable (t: Test, answered: Answered | undefined, name: string, isHead = false): void {
  if (answered === undefined) throw new Error('no answer')
  const { status, headers, body } = answered
  t.equal(status, 503, `${name}: the status`)
  t.equal(headers['retry-after'], '1', `${name}: Retry-After`)
  t.match(headers['content-type'], 'application/json', `${name}: the type`)
  for (const header of ['content-range', 'last-modified']) t.notOk(headers[header], `${name}: ${header}`)
  if (isHead) {
    t.notOk(headers['content-encoding'], `${name}: no encoding of a body that would not be encoded`)
    return
  }
  if (headers['content-length'] !== undefined) t.equal(Number(headers['content-length']), body.length, `${name}: the length`)
  const plain = headers['content-encoding'] === 'gzip' ? gunzipSync(body) : body
  t.match(JSON.parse(plain.toString()), { statusCode: 503, code: 'FST_BGT_ENGINE_UNAVAILABLE' }, `${name}: the body`)
  if (headers.etag !== undefined) t.ok([body, plain].some(of => headers.etag === `"${createHash('sha1').update(of).digest('base64')}"`), `${name}: the etag is that of the 503`)
}

for (const order of ['plugin', 'compress and etag', 'etag and compress']) {
  t.test(`a store that fails, with @fastify/compress and @fastify/etag: the 503 is readable (${order} first)`, async t => {
    const { app, engine, witness, register } = await onBrokenStore(t)
    if (order === 'plugin') await register()
    if (order === 'etag and compress') await app.register(etag)
    await app.register(compress)
    if (order !== 'etag and compress') await app.register(etag)
    if (order !== 'plugin') await register()
    addTasks(app, witness)
    app.addHook('preHandler', async request => { if (request.headers['x-store'] !== 'no') request.backgroundTasks.addTask(job, 'payload') })
    const large = 'x'.repeat(20_000)
    const sources: Readable[] = []
    app.get('/small', async () => ({ ok: true }))
    app.get('/large', async () => ({ large }))
    app.get('/text', async (_request, reply) => reply.type('text/plain').send(large))
    app.get('/buffer', async (_request, reply) => reply.type('text/plain').send(Buffer.from(large)))
    app.get('/own-length', async (_request, reply) => reply.headers({ 'content-length': '20000', 'content-type': 'text/plain' }).send(large))
    app.get('/own-etag', async (_request, reply) => reply.header('etag', '"mine"').send({ ok: true }))
    app.get('/by-hand', (_request, reply) => reply.type('application/json').compress(JSON.stringify({ large })))
    app.get('/stream', async (_request, reply) => {
      const source = Readable.from((function * () { for (let i = 0; i < 500; i++) yield large })())
      sources.push(source)
      return reply.type('text/plain').send(source)
    })
    app.get('/web-stream', async (_request, reply) => reply.type('text/plain').send(new Blob([large]).stream()))
    for (const path of ['/small', '/large', '/text', '/buffer', '/own-length', '/own-etag', '/by-hand', '/stream', '/web-stream']) {
      for (const accepted of ['gzip', 'identity']) {
        const headers = { 'accept-encoding': accepted }
        const name = `${path} ${accepted}`
        isReadable(t, await visit(t, app, witness, { path, headers, outcome: UNAVAILABLE }), name)
        isReadable(t, await visit(t, app, witness, { path, headers, method: 'HEAD', outcome: UNAVAILABLE }), `HEAD ${name}`, true)
        // The etag of the answer as it is when nothing has to be stored.
        const stored = await visit(t, app, witness, { path, headers: { ...headers, 'x-store': 'no' }, outcome: COMPLETE })
        if (stored?.headers.etag === undefined) continue
        const known = { ...headers, 'if-none-match': String(stored.headers.etag) }
        await visit(t, app, witness, { path, headers: { ...known, 'x-store': 'no' }, outcome: withStatus(304) })
        isReadable(t, await visit(t, app, witness, { path, headers: known, outcome: UNAVAILABLE }), `${name} if-none-match`)
      }
    }
    t.ok(sources.length > 0 && sources.every(source => source.destroyed), 'what was not sent is closed')
    t.strictSame(engine.stored, [])
  })
}

t.test('a store that fails, with @fastify/static: the 503 is readable', async t => {
  const { app, witness, register } = await onBrokenStore(t)
  await register()
  addTasks(app, witness)
  app.addHook('preHandler', async request => { if (request.headers['x-store'] !== 'no') request.backgroundTasks.addTask(job, 'payload') })
  await app.register(staticFiles, { root: t.testdir({ 'file.txt': 'x'.repeat(20_000) }) })
  const path = '/file.txt'
  const full = await visit(t, app, witness, { path, headers: { 'x-store': 'no' }, outcome: COMPLETE })
  for (const [name, headers] of Object.entries({ full: {}, range: { range: 'bytes=2-4' }, unchanged: { 'if-none-match': String(full?.headers.etag) } })) {
    isReadable(t, await visit(t, app, witness, { path, headers, outcome: UNAVAILABLE }), name)
    isReadable(t, await visit(t, app, witness, { path, headers, method: 'HEAD', outcome: UNAVAILABLE }), `HEAD ${name}`, true)
  }
})

t.test('an onSend hook of another plugin that fails: nothing is stored', async t => {
  const fails: onSendHookHandler = (_request, _reply, _payload, done) => { done(FAILURE) }
  const failsLater: onSendHookHandler = async () => {
    await new Promise(resolve => { setImmediate(resolve) })
    throw FAILURE
  }
  const others: Record<string, { before?: (app: FastifyInstance) => void, after?: (app: FastifyInstance) => void, onRoute?: onSendHookHandler, isRouteFirst?: boolean }> = {
    'registered before': { before: app => { app.addHook('onSend', fails) } },
    'registered before, asynchronous': { before: app => { app.addHook('onSend', failsLater as never) } },
    'registered after': { after: app => { app.addHook('onSend', fails) } },
    'registered after, asynchronous': { after: app => { app.addHook('onSend', failsLater as never) } },
    'registered behind the route': { isRouteFirst: true, after: app => { app.addHook('onSend', fails) } },
    'of the route': { onRoute: fails },
    'added by the onRoute hook of a later plugin': { after: app => { app.addHook('onRoute', route => { route.onSend = [...[route.onSend ?? []].flat(), fails] as never }) } },
    'added by the onRoute hook of an earlier plugin': { before: app => { app.addHook('onRoute', route => { route.onSend = [...[route.onSend ?? []].flat(), fails] as never }) } }
  }
  for (const [name, { before, after, onRoute, isRouteFirst }] of Object.entries(others)) {
    await t.test(name, async t => {
      const engine = new StubEngine()
      const app = bare(t)
      const witness = new Witness()
      before?.(app)
      await app.register(backgroundTasks, { tasks: [job], engine })
      addTasks(app, witness)
      const route = (): void => {
        app.get('/', { ...(onRoute === undefined ? {} : { onSend: onRoute }) }, async request => {
          request.backgroundTasks.addTask(job, 'payload')
          return 'done'
        })
      }
      if (isRouteFirst === true) route()
      await app.register(async () => {})
      after?.(app)
      if (isRouteFirst !== true) route()
      t.equal((await visit(t, app, witness, { path: '/', outcome: FAILED }))?.status, 500)
      t.strictSame(engine.stored, [])
    })
  }
})

t.test('an answer round Fastify\'s reply', async t => {
  const app = await build(t)
  const witness = new Witness()
  addTasks(app, witness)
  const answer = (reply: FastifyReply): void => { reply.raw.writeHead(202).end('by hand') }
  app.get('/hook/callback', { preHandler: (_request, reply, _done) => { answer(reply) } }, async () => { t.fail('the hook has answered') })
  app.get('/hook/async', { preHandler: async (_request, reply) => { answer(reply); return reply } }, async () => { t.fail('the hook has answered') })
  app.get('/handler/callback', (_request, reply) => { answer(reply) })
  app.get('/handler/later', (_request, reply) => { setImmediate(answer, reply) })
  app.get('/handler/async', async (_request, reply) => { answer(reply) })
  app.get('/handler/returns-reply', async (_request, reply) => { answer(reply); return reply })
  app.register(async child => { child.setNotFoundHandler((_request, reply) => { answer(reply) }) }, { prefix: '/not-found/callback' })
  app.register(async child => { child.setNotFoundHandler(async (_request, reply) => { answer(reply) }) }, { prefix: '/not-found/async' })
  for (const path of ['/hook/callback', '/hook/async', '/handler/callback', '/handler/later', '/handler/async', '/handler/returns-reply', '/not-found/callback/x', '/not-found/async/x']) {
    t.equal((await visit(t, app, witness, { path, outcome: withStatus(202) }))?.body.toString(), 'by hand', path)
  }
})

t.test('events are written to the raw response, and the client leaves', async t => {
  const app = await build(t)
  const witness = new Witness()
  addTasks(app, witness)
  const write = (reply: FastifyReply): void => {
    reply.raw.writeHead(200, { 'content-type': 'text/event-stream' })
    reply.raw.write('data: hello\n\n')
  }
  app.get('/callback', (_request, reply) => { write(reply) })
  app.get('/hijacked', (_request, reply) => { reply.hijack(); write(reply) })
  app.get('/async', async (_request, reply) => { write(reply); await once(reply.raw, 'close') })
  app.get('/async/at-once', async (_request, reply) => { write(reply) })
  app.get('/async/reply', async (_request, reply) => { write(reply); return reply })
  app.get('/hook', { preHandler: (_request, reply, _done) => { write(reply) } }, async () => {})
  for (const path of ['/callback', '/hijacked', '/async', '/async/at-once', '/async/reply', '/hook']) {
    await visit(t, app, witness, { path, leaves: 'in mid-answer', outcome: ABORTED })
  }
})

t.test('app.routing makes a second request of a raw one', async t => {
  for (const hijacks of [true, false]) {
    await t.test(hijacks ? 'the first reply is hijacked' : 'the first handler gives no sign', async t => {
      const app = await build(t)
      const witness = new Witness()
      const arrived = deferred()
      addTasks(app, witness)
      for (const path of ['second', 'throws', 'endless', 'waits', 'nowhere']) {
        app.get(`/first/${path}`, (request, reply) => {
          if (hijacks) reply.hijack()
          request.raw.url = `/${path}`
          app.routing(request.raw, reply.raw)
        })
      }
      app.get('/second', async () => 'from the second')
      app.get('/throws', async () => { throw FAILURE })
      app.get('/endless', async () => endless())
      app.get('/waits', async (_request, reply) => { arrived.resolve(); await once(reply.raw, 'close') })
      const tasks = ['task', 'task']
      t.equal((await visit(t, app, witness, { path: '/first/second', tasks, outcome: COMPLETE }))?.body.toString(), 'from the second')
      await visit(t, app, witness, { path: '/first/nowhere', tasks, outcome: withStatus(404) })
      await visit(t, app, witness, { path: '/first/throws', tasks, outcome: { statusCode: 500, aborted: false } })
      await visit(t, app, witness, { path: '/first/endless', tasks, leaves: 'in mid-answer', outcome: ABORTED })
      // Without a sign the first handler's tasks would take 10 s here, and may.
      if (hijacks) await visit(t, app, witness, { path: '/first/waits', tasks, leaves: arrived.promise, outcome: ABORTED })
    })
  }
})

t.test('a route declared before a registration that is not awaited', async t => {
  const app = bare(t)
  const witness = new Witness()
  let arrived = deferred()
  addTasks(app, witness)
  app.get('/value', async () => 'done')
  app.get('/throws', async () => { throw FAILURE })
  app.get('/throws/at-once', () => { throw FAILURE })
  app.get('/raw', (_request, reply) => { reply.raw.end('done') })
  app.get('/endless', async () => endless())
  app.get('/late', async (_request, reply) => { arrived.resolve(); await once(reply.raw, 'close'); return 'late' })
  app.get('/late/throws', async (_request, reply) => { arrived.resolve(); await once(reply.raw, 'close'); throw FAILURE })
  app.register(backgroundTasks)
  for (const path of ['/value', '/raw']) t.equal((await visit(t, app, witness, { path, outcome: COMPLETE }))?.body.toString(), 'done')
  for (const path of ['/throws', '/throws/at-once']) await visit(t, app, witness, { path, outcome: FAILED })
  await visit(t, app, witness, { path: '/endless', leaves: 'in mid-answer', outcome: ABORTED })
  await visit(t, app, witness, { path: '/late', leaves: arrived.promise, outcome: ABORTED })
  arrived = deferred()
  await visit(t, app, witness, { path: '/late/throws', leaves: arrived.promise, outcome: { ...FAILED, aborted: true } })
})

t.test('a frozen request', async t => {
  const refused = { statusCode: 500, failed: true, error: TypeError, aborted: false }
  for (const where of ['onRequest, before this plugin', 'onRequest, after this plugin', 'preHandler']) {
    for (const adds of ['before', 'after']) {
      await t.test(`it is frozen in ${where}, and the task is added ${adds}`, async t => {
        const app = bare(t)
        const witness = new Witness()
        let arrived = deferred()
        const late = async (reply: FastifyReply): Promise<string> => {
          arrived.resolve()
          await once(reply.raw, 'close')
          return 'late'
        }
        const freeze = async (request: FastifyRequest, reply: FastifyReply): Promise<FastifyReply | undefined> => {
          Object.freeze(request)
          if (adds === 'after') witness.add(request, 'task')
          if (request.url === '/hook') return reply.send('from the hook')
          if (request.url === '/hook/late') return reply.send(await late(reply))
        }
        if (adds === 'before') addTasks(app, witness)
        if (where === 'onRequest, before this plugin') app.addHook('onRequest', freeze)
        await app.register(backgroundTasks)
        if (where === 'onRequest, after this plugin') app.addHook('onRequest', freeze)
        if (where === 'preHandler') app.addHook('preHandler', freeze)
        // Fastify writes to the request behind these hooks: one more that takes a callback makes a 500 of what it throws.
        app.addHook('onRequest', (_request, _reply, done) => { done() })
        for (const path of ['/hook', '/hook/late']) app.get(path, async () => { t.fail('the hook has answered') })
        app.get('/value', async request => Object.isFrozen(request) ? 'frozen' : 'not frozen')
        app.get('/throws', async () => { throw FAILURE })
        app.get('/late', async (_request, reply) => await late(reply))
        app.get('/late/undefined', async (_request, reply) => { await late(reply) })
        app.get('/raw', (_request, reply) => { reply.raw.end('done') })
        const reachesHandler = where === 'preHandler'
        t.equal((await visit(t, app, witness, { path: '/hook', outcome: COMPLETE }))?.body.toString(), 'from the hook')
        await visit(t, app, witness, { path: '/hook/late', leaves: arrived.promise, outcome: ABORTED })
        await visit(t, app, witness, { path: '/value', outcome: reachesHandler ? COMPLETE : refused })
        if (!reachesHandler) return
        await visit(t, app, witness, { path: '/throws', outcome: FAILED })
        await visit(t, app, witness, { path: '/raw', outcome: COMPLETE })
        for (const path of ['/late', '/late/undefined']) {
          arrived = deferred()
          await visit(t, app, witness, { path, leaves: arrived.promise, outcome: ABORTED })
        }
      })
    }
  }
})

t.test('another plugin has a send of its own', async t => {
  type Send = FastifyReply['send']
  const calls = (original: Send): Send => function (this: FastifyReply, payload) { return original.call(this, payload) } as Send
  /** The prototype that has Fastify's own `send`. */
  const owner = (reply: FastifyReply): FastifyReply => Object.hasOwn(reply, 'send') ? reply : owner(Object.getPrototypeOf(reply) as FastifyReply)
  const own = function (this: FastifyReply, payload: unknown) { return owner(Object.getPrototypeOf(owner(this)) as FastifyReply).send.call(this, payload) }
  let restore = (): void => {}
  const ways: Record<string, { before?: (app: FastifyInstance) => void, after?: (app: FastifyInstance) => void }> = {
    'on the reply': { after: app => { app.addHook('onRequest', async (_request, reply) => { reply.send = calls(reply.send) }) } },
    'on the reply, before this plugin': { before: app => { app.addHook('onRequest', async (_request, reply) => { reply.send = calls(reply.send) }) } },
    'on the prototype, by the first request': {
      after: app => {
        app.addHook('onRequest', async (_request, reply) => {
          const prototype = owner(reply)
          const { send } = prototype
          restore()
          restore = () => { prototype.send = send }
          prototype.send = calls(send)
        })
      }
    },
    'by decorateReply, before this plugin': { before: app => { app.decorateReply('send', own as never) } },
    'by decorateReply, after this plugin': { after: app => { app.decorateReply('send', own as never) } }
  }
  for (const [name, { before, after }] of Object.entries(ways)) {
    await t.test(name, async t => {
      const app = bare(t)
      const witness = new Witness()
      let arrived = deferred()
      t.teardown(() => { restore() })
      before?.(app)
      await app.register(backgroundTasks)
      after?.(app)
      addTasks(app, witness)
      app.get('/value', async () => 'done')
      app.get('/send', (_request, reply) => { reply.send('done') })
      app.get('/throws', async () => { throw FAILURE })
      app.get('/late', async (_request, reply) => { arrived.resolve(); await once(reply.raw, 'close'); return 'late' })
      app.get('/late/send', (_request, reply) => { arrived.resolve(); reply.raw.once('close', () => { reply.send('late') }) })
      for (const path of ['/value', '/send']) t.equal((await visit(t, app, witness, { path, outcome: COMPLETE }))?.body.toString(), 'done')
      await visit(t, app, witness, { path: '/throws', outcome: FAILED })
      for (const path of ['/late', '/late/send']) {
        arrived = deferred()
        await visit(t, app, witness, { path, leaves: arrived.promise, outcome: ABORTED })
      }
    })
  }
})

for (const leaves of [false, true]) {
  t.test(`twelve pipelined responses, without a warning of too many listeners (the client ${leaves ? 'leaves' : 'stays'})`, async t => {
    const app = await build(t)
    const release = deferred()
    const allReplied = deferred()
    const warnings: string[] = []
    const warn = (warning: Error): void => { warnings.push(warning.name) }
    process.on('warning', warn)
    t.teardown(() => { process.removeListener('warning', warn) })
    const outcomes: Array<ExchangeOutcome | undefined> = []
    let replied = 0
    app.get('/:n', (request, reply) => {
      request.backgroundTasks.with({ when: 'always' }).addTask(() => { outcomes.push(request.backgroundTasks.outcome) })
      const send = (): void => { reply.send('done') }
      if ((request.params as { n: string }).n === '0') void release.promise.then(send)
      else send()
      if (++replied === 12) allReplied.resolve()
    })
    const socket = await connectRaw(t, app)
    let received = ''
    socket.on('data', chunk => { received += String(chunk) })
    socket.write(Array.from({ length: 12 }, (_, n) => requestText(`/${n}`)).join(''))
    await allReplied.promise
    await turn(app)
    t.strictSame(outcomes, [], 'they wait for their turns')
    if (leaves) {
      socket.destroy()
      while (outcomes.length < 11) await turn(app)
    }
    release.resolve()
    await app.backgroundTasks.idle()
    t.strictSame(outcomes, Array(12).fill(leaves ? ABORTED : COMPLETE))
    if (!leaves) {
      while (received.split('done').length < 13) await once(socket, 'data')
    }
    // Node emits warnings on a later tick.
    await turn(app)
    t.strictSame(warnings, [])
  })
}

type Handler = (reply: FastifyReply, stream: ServerHttp2Stream, left: () => Promise<void>) => unknown
const large = Buffer.alloc(2 * 1024 * 1024, 'x')
const by = (statusCode: number): ExchangeOutcome => ({ ...ABORTED, statusCode })

/** On a reply that is hijacked. */
const onStream = (answer: (stream: ServerHttp2Stream) => void): Handler => (reply, stream) => {
  reply.hijack()
  stream.respond({ ':status': 201 })
  answer(stream)
}

/** What answers, what the client waits for before it closes its stream, and the outcome. */
const answers: Record<string, readonly [handler: Handler, waitsFor: 'the request' | 'the head' | 'the body', outcome: object]> = {
  'before the answer of a promise': [async (_reply, _stream, left) => { await left(); return 'late' }, 'the request', ABORTED],
  'before a promise ends with undefined': [async (_reply, _stream, left) => { await left() }, 'the request', ABORTED],
  'before a promise fails': [async (_reply, _stream, left) => { await left(); throw FAILURE }, 'the request', { failed: true, error: FAILURE, aborted: true }],
  'in the middle of a stream that is sent': [async () => endless(), 'the head', ABORTED],
  'in the middle of raw.write, with headers': [reply => { reply.raw.writeHead(201, { 'content-type': 'text/event-stream' }).write('some') }, 'the head', by(201)],
  'in the middle of a stream on a hijacked reply': [reply => { reply.hijack(); endless().pipe(reply.raw) }, 'the head', ABORTED],
  'when all was handed over by send': [async () => large, 'the head', ABORTED],
  'when all was handed over by raw.end': [reply => { reply.raw.end(large) }, 'the head', ABORTED],
  'when all was handed over by raw.end, with headers': [reply => { reply.raw.writeHead(201, { 'content-type': 'text/plain' }).end(large) }, 'the head', by(201)],
  'when all was handed over by raw.end, and the promise has ended': [async reply => { reply.raw.end(large) }, 'the head', ABORTED],
  'when all was handed over by raw.end on a hijacked reply': [reply => { reply.hijack(); reply.raw.end(large) }, 'the head', ABORTED],
  'when all was handed over on raw.stream': [onStream(stream => { stream.end(large) }), 'the head', by(201)],
  'in the middle of what is written to raw.stream': [onStream(stream => { stream.write('some') }), 'the head', by(201)],
  'when it has all that was written to raw.stream': [onStream(stream => { stream.end('by hand') }), 'the body', withStatus(201)]
}

for (const [name, [handler, waitsFor, outcome]] of Object.entries(answers)) {
  t.test(`HTTP/2: the client closes its stream with NO_ERROR ${name}`, async t => {
    const app = await build(t, { http2: true })
    const witness = new Witness()
    const arrived = deferred()
    // Node keeps such a stream, and with it its session: without this even an app without plugins does not close.
    app.server.on('session', (session: http2.ServerHttp2Session) => { t.teardown(() => { session.destroy() }) })
    addTasks(app, witness)
    app.get('/', (_request, reply) => {
      const { stream } = reply.raw as unknown as { stream: ServerHttp2Stream }
      arrived.resolve()
      return handler(reply, stream, async () => { while (!stream.closed) await turn(app) })
    })
    const session = http2.connect(`http://127.0.0.1:${await listen(app)}`)
    t.teardown(() => { session.destroy() })
    const stream = session.request({ ':path': '/' })
    stream.on('error', () => {})
    if (waitsFor === 'the body') t.equal(await text(stream), 'by hand')
    // Nothing is read: the window of the stream stays full.
    else await (waitsFor === 'the head' ? once(stream, 'response') : arrived.promise)
    stream.close(http2.constants.NGHTTP2_NO_ERROR)
    await endsSoon(t, app, witness, outcome, name)
  })
}
