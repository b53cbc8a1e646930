/**
 * With the real packages: whoever answers the request, its exchange ends once, its tasks run once and soon, with the right outcome.
 * Adapters of serverless platforms, and what needs no package, are in real-packages-serverless.test.ts.
 */
import { once } from 'node:events'
import http, { type IncomingMessage, type ServerResponse } from 'node:http'
import { createRequire } from 'node:module'
import type { AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import { setTimeout } from 'node:timers/promises'
import { gunzipSync } from 'node:zlib'
import compress from '@fastify/compress'
import etag from '@fastify/etag'
import express from '@fastify/express'
import httpProxy from '@fastify/http-proxy'
import middie from '@fastify/middie'
import replyFrom from '@fastify/reply-from'
import { fastifySSE as sse } from '@fastify/sse'
import staticFiles from '@fastify/static'
import websocket from '@fastify/websocket'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import WebSocket, { WebSocketServer } from 'ws'
import { deferred } from './support/app.js'
import { ABORTED, bare, build, COMPLETE, FAILED, FAILURE, listen, turn, Witness } from './support/sockets.js'
import { addTasks, endless, endsSoon, send, visit } from './support/visits.js'
import backgroundTasks, { type ExchangeOutcome } from '../lib/index.js'

t.setTimeout(120_000)

type Middleware = (request: IncomingMessage, response: ServerResponse, next: (error?: Error) => void) => void

/** The order in which the hook that adds tasks, the package and this plugin are registered. */
const orders = {
  'the package is registered after this plugin': ['plugin', 'hook', 'package'],
  'the package is registered before this plugin': ['hook', 'package', 'plugin'],
  'the hook that adds tasks is registered before this plugin': ['hook', 'plugin', 'package']
} as const

type Use = (app: FastifyInstance) => unknown

type Order = keyof typeof orders
type Run = (t: Test, app: FastifyInstance, witness: Witness) => Promise<void>

/** Runs a test for each order. */
async function inEachOrder (t: Test, use: Use, run: Run, names = Object.keys(orders) as Order[]): Promise<void> {
  for (const name of names) {
    await t.test(name, async t => {
      const app = bare(t)
      const witness = new Witness()
      for (const step of orders[name]) {
        if (step === 'plugin') await app.register(backgroundTasks)
        if (step === 'hook') addTasks(app, witness)
        if (step === 'package') await use(app)
      }
      await run(t, app, witness)
    })
  }
}

/** A package that answers in a hook before this plugin's has tests of its own. */
const PLUGIN_FIRST: Order[] = ['the package is registered after this plugin', 'the hook that adds tasks is registered before this plugin']

const withStatus = (statusCode: number): ExchangeOutcome => ({ ...COMPLETE, statusCode })

t.test('@fastify/middie: a middleware answers', async t => {
  const middlewares: Record<string, Middleware> = {
    '/ends': (_request, response) => { response.end('done') },
    '/ends-later': (_request, response) => { setImmediate(() => { response.writeHead(201).end('done') }) },
    '/pipes': (_request, response) => { Readable.from(['one', 'two']).pipe(response) },
    '/endless': (_request, response) => { endless().pipe(response) },
    '/fails': (_request, _response, next) => { next(FAILURE) },
    '/goes-on': (_request, _response, next) => { setImmediate(next) }
  }
  await inEachOrder(t, async app => {
    await app.register(middie)
    for (const [path, middleware] of Object.entries(middlewares)) app.use(path, middleware)
  }, async (t, app, witness) => {
    app.get('/goes-on', async () => 'from the route')
    app.get('/ends', async () => { t.fail('the middleware has answered') })
    t.equal((await visit(t, app, witness, { path: '/ends', outcome: COMPLETE }))?.body.toString(), 'done')
    t.equal((await visit(t, app, witness, { path: '/ends-later', outcome: withStatus(201) }))?.body.toString(), 'done')
    t.equal((await visit(t, app, witness, { path: '/pipes', outcome: COMPLETE }))?.body.toString(), 'onetwo')
    t.equal((await visit(t, app, witness, { path: '/goes-on', outcome: COMPLETE }))?.body.toString(), 'from the route')
    t.equal((await visit(t, app, witness, { path: '/fails', outcome: FAILED }))?.status, 500)
    t.equal((await visit(t, app, witness, { path: '/nowhere', outcome: withStatus(404) }))?.status, 404)
    await visit(t, app, witness, { path: '/endless', leaves: 'in mid-answer', outcome: ABORTED })
  }, PLUGIN_FIRST)
})

for (const [name, middlewares] of Object.entries({ '@fastify/middie': middie, '@fastify/express': express })) {
  t.test(`${name} is registered before this plugin: its middleware answers, and no hook of this plugin is called`, async t => {
    await inEachOrder(t, async app => {
      await app.register(middlewares as typeof middie)
      app.use('/ends', (_request: IncomingMessage, response: ServerResponse) => { response.end('done') })
    }, async (t, app, witness) => {
      await visit(t, app, witness, { path: '/ends', outcome: COMPLETE })
    }, ['the package is registered before this plugin'])
  })
}

t.test('@fastify/middie: the one slow case, a middleware that gives no sign when its client has left, ends after 10 s', async t => {
  const app = await build(t)
  const witness = new Witness()
  const arrived = deferred()
  addTasks(app, witness)
  await app.register(middie)
  app.use('/silent', () => { arrived.resolve() })
  const { leave } = send(await listen(app), { path: '/silent' })
  await arrived.promise
  const left = performance.now()
  leave()
  await app.backgroundTasks.idle()
  const ms = performance.now() - left
  t.ok(ms > 9_000 && ms < 13_000, `after ${Math.round(ms)} ms`)
  t.strictSame(witness.take(), ['task'])
  t.strictSame(witness.outcome, ABORTED)
})

interface ExpressResponse extends ServerResponse {
  json: (value: unknown) => void
  send: (value: unknown) => void
  status: (code: number) => ExpressResponse
  sendFile: (path: string) => void
}
type ExpressHandler = (request: IncomingMessage, response: ExpressResponse, next: (error?: Error) => void) => unknown
type ExpressApp = Middleware & { get: (path: string, handler: ExpressHandler) => void, use: (handler: ExpressHandler) => void }

t.test('@fastify/express: middleware, and a mounted app, answer', async t => {
  const makeApp = createRequire(createRequire(import.meta.url).resolve('@fastify/express'))('express') as () => ExpressApp
  let arrived = deferred()
  await inEachOrder(t, async app => {
    await app.register(express)
    app.use('/ends', (_request: IncomingMessage, response: ServerResponse) => { response.end('done') })
    app.use('/goes-on', (_request: IncomingMessage, _response: ServerResponse, next: () => void) => { setImmediate(next) })
    const mounted = makeApp()
    mounted.get('/json', (_request, response) => { response.status(201).json({ ok: true }) })
    mounted.get('/send', (_request, response) => { response.send('<p>done</p>') })
    mounted.get('/end', (_request, response) => { response.end('done') })
    mounted.get('/pipes', (_request, response) => { Readable.from(['one', 'two']).pipe(response) })
    mounted.get('/file', (_request, response) => { response.sendFile(import.meta.filename) })
    mounted.get('/endless', (_request, response) => { endless().pipe(response) })
    mounted.get('/events', (_request, response) => {
      response.writeHead(200, { 'content-type': 'text/event-stream' })
      response.write('data: hello\n\n')
    })
    mounted.get('/waits', async (_request, response) => {
      arrived.resolve()
      await once(response, 'close')
      response.json({ ok: true })
    })
    mounted.get('/throws', () => { throw FAILURE })
    app.use('/mounted', mounted)
  }, async (t, app, witness) => {
    arrived = deferred()
    app.get('/goes-on', async () => 'from the route')
    t.equal((await visit(t, app, witness, { path: '/ends', outcome: COMPLETE }))?.body.toString(), 'done')
    t.equal((await visit(t, app, witness, { path: '/goes-on', outcome: COMPLETE }))?.body.toString(), 'from the route')
    t.equal((await visit(t, app, witness, { path: '/mounted/json', outcome: withStatus(201) }))?.body.toString(), '{"ok":true}')
    t.equal((await visit(t, app, witness, { path: '/mounted/send', outcome: COMPLETE }))?.body.toString(), '<p>done</p>')
    t.equal((await visit(t, app, witness, { path: '/mounted/end', outcome: COMPLETE }))?.body.toString(), 'done')
    t.equal((await visit(t, app, witness, { path: '/mounted/pipes', outcome: COMPLETE }))?.body.toString(), 'onetwo')
    t.match((await visit(t, app, witness, { path: '/mounted/file', outcome: COMPLETE }))?.body.toString(), 'With the real packages')
    t.equal((await visit(t, app, witness, { path: '/mounted/nowhere', outcome: withStatus(404) }))?.status, 404)
    t.equal((await visit(t, app, witness, { path: '/mounted/throws', outcome: FAILED }))?.status, 500)
    await visit(t, app, witness, { path: '/mounted/waits', leaves: arrived.promise, outcome: { ...ABORTED, statusCode: Number } })
    // Express stands in for `headersSent` of the raw response, and says no when a handler has piped to it.
    if (!t.name.startsWith('the package')) return
    await visit(t, app, witness, { path: '/mounted/endless', leaves: 'in mid-answer', outcome: ABORTED })
    await visit(t, app, witness, { path: '/mounted/events', leaves: 'in mid-answer', outcome: ABORTED })
  }, PLUGIN_FIRST)
})

t.test('@fastify/sse: events are sent', async t => {
  await inEachOrder(t, async app => { await app.register(sse) }, async (t, app, witness) => {
    async function * events (): AsyncGenerator<{ data: string }> {
      while (true) {
        yield { data: 'hello' }
        await setTimeout(1)
      }
    }
    app.get('/two', { sse: 'only' }, async (_request, reply) => {
      await reply.sse.send({ data: 'one' })
      await reply.sse.send({ data: 'two' })
    })
    app.get('/kept-alive', { sse: 'only' }, async (_request, reply) => {
      reply.sse.keepAlive()
      await reply.sse.send({ data: 'one' })
    })
    app.get('/closed-later', { sse: 'only' }, async (_request, reply) => {
      reply.sse.keepAlive()
      await reply.sse.send({ data: 'one' })
      setImmediate(() => { reply.sse.close() })
    })
    app.get('/iterable', { sse: 'only' }, async (_request, reply) => { await reply.sse.send(events()) })
    app.get('/readable', { sse: 'only' }, async (_request, reply) => { await reply.sse.send(Readable.from(events())) })
    app.get('/fails', { sse: 'only' }, async () => { throw FAILURE })
    app.get('/fails-late', { sse: 'only' }, async (_request, reply) => {
      await reply.sse.send({ data: 'one' })
      throw FAILURE
    })
    app.get('/manual', { sse: 'manual' }, async () => ({ plain: true }))
    app.get('/dual', { sse: 'dual' }, async (_request, reply) => reply.code(202).send({ plain: true }))

    t.equal((await visit(t, app, witness, { path: '/two', outcome: COMPLETE }))?.body.toString(), 'data: "one"\n\ndata: "two"\n\n')
    t.equal((await visit(t, app, witness, { path: '/closed-later', outcome: COMPLETE }))?.body.toString(), 'data: "one"\n\n')
    await visit(t, app, witness, { path: '/fails', outcome: FAILED })
    await visit(t, app, witness, { path: '/fails-late', outcome: { statusCode: 200, aborted: false } })
    t.equal((await visit(t, app, witness, { path: '/manual', outcome: COMPLETE }))?.body.toString(), '{"plain":true}')
    await visit(t, app, witness, { path: '/dual', outcome: withStatus(202) })
    await visit(t, app, witness, { path: '/two', headers: { accept: 'text/html' }, outcome: withStatus(406) })
    for (const path of ['/kept-alive', '/iterable', '/readable']) {
      await visit(t, app, witness, { path, leaves: 'in mid-answer', outcome: ABORTED })
    }
  })
})

t.test('@fastify/sse: a client that reads nothing leaves; the promise of the package never settles, and the tasks run at the end of the drain', async t => {
  const app = await build(t)
  const witness = new Witness()
  addTasks(app, witness)
  await app.register(sse)
  const isFull = deferred()
  app.get('/', { sse: 'only' }, async (_request, reply) => {
    const write = reply.raw.write.bind(reply.raw)
    reply.raw.write = (chunk: string) => {
      const goesOn = write(chunk)
      if (!goesOn) isFull.resolve()
      return goesOn
    }
    while (true) await reply.sse.send({ data: 'x'.repeat(100_000) })
  })
  const { leave } = send(await listen(app), { path: '/' })
  await isFull.promise
  leave()
  await app.close()
  t.strictSame(witness.take(), ['task'])
  t.strictSame(witness.outcome, ABORTED)
})

/** A server behind a proxy. */
async function upstream (t: Test) {
  let reached = deferred()
  let lateAnswer = deferred()
  const server = http.createServer((request, response) => {
    const path = request.url ?? ''
    if (path.startsWith('/ok')) response.end('from upstream')
    if (path.startsWith('/echo')) request.pipe(response)
    if (path.startsWith('/fails')) response.writeHead(500).end('no')
    if (path.startsWith('/drops')) request.socket.destroy()
    if (path.startsWith('/endless')) endless().on('error', () => {}).pipe(response)
    if (path.startsWith('/breaks')) response.write('half', () => { request.socket.destroy() })
    if (path.startsWith('/late')) {
      reached.resolve()
      void lateAnswer.promise.then(() => { response.end('late') })
    }
  })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.closeAllConnections()
    server.close()
  })
  return {
    server,
    base: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    /** Before a visit to `/late`: resolves when it has come to this server. */
    expect () {
      reached = deferred()
      lateAnswer = deferred()
      return reached.promise
    },
    answer () { lateAnswer.resolve() }
  }
}

/** What a proxy does, whichever it is. */
async function proxies (t: Test, app: FastifyInstance, witness: Witness, { expect, answer }: Awaited<ReturnType<typeof upstream>>, prefix: string, isSilent = false): Promise<void> {
  const see = async (path: string, plan: Partial<Parameters<typeof visit>[3]> & { outcome: object }) => await visit(t, app, witness, { path: prefix + path, ...plan })
  t.equal((await see('/ok', { outcome: COMPLETE }))?.body.toString(), 'from upstream')
  t.equal((await see('/ok', { method: 'HEAD', outcome: COMPLETE }))?.status, 200)
  t.equal((await see('/echo', { method: 'POST', body: 'hello', outcome: COMPLETE }))?.body.toString(), 'hello')
  t.equal((await see('/fails', { outcome: withStatus(500) }))?.status, 500, 'the status of the other server is no failure')
  t.equal((await see('/drops', { outcome: { statusCode: 500, failed: true, error: Error, aborted: false } }))?.status, 500)
  await see('/endless', { leaves: 'in mid-answer', outcome: ABORTED })
  await see('/breaks', { leaves: 'in mid-answer', outcome: ABORTED })
  if (!isSilent) await see('/late', { leaves: expect(), outcome: ABORTED })
  answer()
  await see('/ok', { outcome: COMPLETE })
  t.strictSame(witness.take(), [], 'an answer that comes too late changes nothing')
}

for (const [client, options] of Object.entries({ undici: {}, http: { http: {} } })) {
  t.test(`@fastify/http-proxy over ${client}`, async t => {
    const behind = await upstream(t)
    await inEachOrder(t, async app => {
      await app.register(httpProxy, { upstream: behind.base, prefix: '/proxy', destroyAgent: true, ...options })
    }, async (t, app, witness) => {
      // What a handler returns is not seen on routes that were declared before: an abort is waited for then, for 10 s.
      await proxies(t, app, witness, behind, '/proxy', t.name === 'the package is registered before this plugin')
    })
  })

  t.test(`@fastify/reply-from over ${client}`, async t => {
    const behind = await upstream(t)
    await inEachOrder(t, async app => {
      await app.register(replyFrom, { base: behind.base, destroyAgent: true, ...options })
    }, async (t, app, witness) => {
      app.all('/returned/*', (request, reply) => reply.from(request.url.slice('/returned'.length)))
      app.all('/async/*', async (request, reply) => reply.from(request.url.slice('/async'.length)))
      app.all('/awaited/*', async (request, reply) => { await reply.from(request.url.slice('/awaited'.length)) })
      app.all('/rewritten/*', async (request, reply) => reply.from(request.url.slice('/rewritten'.length), {
        onResponse (_request, reply, response) { reply.send((response as unknown as { stream: Readable }).stream) }
      }))
      for (const prefix of ['/returned', '/async', '/awaited', '/rewritten']) await proxies(t, app, witness, behind, prefix)
    })
  })
}

t.test('@fastify/http-proxy: a websocket is passed on', async t => {
  const behind = await upstream(t)
  const sockets = new WebSocketServer({ server: behind.server })
  t.teardown(() => { for (const socket of sockets.clients) socket.terminate() })
  sockets.on('connection', socket => { socket.on('message', data => { socket.send(String(data).toUpperCase()) }) })
  await inEachOrder(t, async app => {
    await app.register(httpProxy, { upstream: behind.base, prefix: '/proxy', websocket: true, destroyAgent: true })
  }, async (t, app, witness) => {
    const client = new WebSocket(`ws://127.0.0.1:${await listen(app)}/proxy/`)
    await once(client, 'open')
    await endsSoon(t, app, witness, withStatus(101), 'the upgrade')
    client.send('hello')
    t.equal(String((await once(client, 'message'))[0]), 'HELLO')
    client.terminate()
    await once(client, 'close')
    await turn(app)
    t.strictSame(witness.take(), [], 'its end changes nothing')
  })
})

t.test('@fastify/static: files are sent', async t => {
  const root = t.testdir({ 'small.txt': '0123456789', 'big.bin': Buffer.alloc(16 * 1024 * 1024, 'x') })
  await inEachOrder(t, async app => { await app.register(staticFiles, { root }) }, async (t, app, witness) => {
    app.get('/by-name', (_request, reply) => reply.sendFile('small.txt'))
    app.get('/by-name/big', async (_request, reply) => reply.sendFile('big.bin'))
    app.get('/download', (_request, reply) => reply.download('small.txt'))
    for (const path of ['/small.txt', '/by-name', '/download']) {
      const full = await visit(t, app, witness, { path, outcome: COMPLETE })
      t.equal(full?.body.toString(), '0123456789')
      await visit(t, app, witness, { path, method: 'HEAD', outcome: COMPLETE })
      const part = await visit(t, app, witness, { path, headers: { range: 'bytes=2-4' }, outcome: withStatus(206) })
      t.equal(part?.body.toString(), '234')
      const unchanged = await visit(t, app, witness, { path, headers: { 'if-none-match': String(full?.headers.etag) }, outcome: withStatus(304) })
      t.equal(unchanged?.body.length, 0)
      await visit(t, app, witness, { path, headers: { range: 'bytes=20-' }, outcome: { statusCode: 416, aborted: false } })
    }
    await visit(t, app, witness, { path: '/missing.txt', outcome: withStatus(404) })
    for (const path of ['/big.bin', '/by-name/big']) {
      await visit(t, app, witness, { path, leaves: 'in mid-answer', outcome: ABORTED })
      await visit(t, app, witness, { path, headers: { range: 'bytes=5-' }, leaves: 'in mid-answer', outcome: { ...ABORTED, statusCode: 206 } })
    }
  })
})

t.test('@fastify/compress and @fastify/etag change the answer', async t => {
  const large = { text: 'x'.repeat(10_000) }
  await inEachOrder(t, async app => {
    await app.register(etag)
    await app.register(compress)
  }, async (t, app, witness) => {
    app.get('/small', async () => ({ ok: true }))
    app.get('/large', async () => large)
    app.get('/stream', async (_request, reply) => reply.type('text/plain').send(Readable.from(['one', 'two'])))
    app.get('/by-hand', (_request, reply) => reply.type('application/json').compress(JSON.stringify(large)))
    app.get('/endless', async (_request, reply) => reply.type('text/plain').send(endless()))
    app.get('/fails', async () => { throw FAILURE })
    const headers = { 'accept-encoding': 'gzip' }
    const small = await visit(t, app, witness, { path: '/small', headers, outcome: COMPLETE })
    t.equal(small?.body.toString(), '{"ok":true}')
    await visit(t, app, witness, { path: '/small', headers: { ...headers, 'if-none-match': String(small?.headers.etag) }, outcome: withStatus(304) })
    for (const [path, text] of [['/large', JSON.stringify(large)], ['/by-hand', JSON.stringify(large)], ['/stream', 'onetwo']] as const) {
      const zipped = await visit(t, app, witness, { path, headers, outcome: COMPLETE })
      t.equal(gunzipSync(zipped?.body ?? Buffer.alloc(0)).toString(), text)
      await visit(t, app, witness, { path, headers, method: 'HEAD', outcome: COMPLETE })
      if (path === '/large') await visit(t, app, witness, { path, headers: { ...headers, 'if-none-match': String(zipped?.headers.etag) }, outcome: withStatus(304) })
    }
    await visit(t, app, witness, { path: '/fails', headers, outcome: FAILED })
    // What zips it keeps the first bytes back for long, as they are all the same: the client leaves without an answer's body.
    await visit(t, app, witness, { path: '/endless', headers, leaves: 'in mid-answer', outcome: ABORTED })
  })
})

t.test('@fastify/websocket: injectWS, with tasks of a preHandler hook', async t => {
  await inEachOrder(t, async app => { await app.register(websocket) }, async (t, app, witness) => {
    app.addHook('preHandler', async request => { witness.add(request, 'preHandler task') })
    app.get('/', { websocket: true }, (socket, request) => {
      witness.add(request, 'handler task')
      socket.on('message', () => { socket.send('got it') })
    })
    await app.ready()
    const client = await app.injectWS('/')
    t.teardown(() => { client.terminate() })
    await endsSoon(t, app, witness, withStatus(101), 'injectWS', ['task', 'preHandler task', 'handler task'])
    client.send('hello')
    t.equal(String((await once(client, 'message'))[0]), 'got it')
    client.terminate()
    await turn(app)
    t.strictSame(witness.take(), [])
  })
})
