/**
 * When the tasks of a request run, and with which outcome, where a protocol, Fastify's options or other plugins make it
 * special; what is the same on every protocol is in exchange-protocols.test.ts.
 */
import { once } from 'node:events'
import http, { METHODS } from 'node:http'
import http2 from 'node:http2'
import type { Socket } from 'node:net'
import { text } from 'node:stream/consumers'
import websocket from '@fastify/websocket'
import type { FastifyInstance, FastifyPluginAsync } from 'fastify'
import t, { type Test } from 'tap'
import WebSocket from 'ws'
import { beforeFastify } from './support/fastify-version.js'
import {
  ABORTED, bare, build, COMPLETE, connectRaw, FAILED, FAILURE, gone, listen, requestText, transports, turn, Witness, type Client
} from './support/sockets.js'
import { endsSoon } from './support/visits.js'
import backgroundTasks from '../lib/index.js'

const http1 = transports['HTTP/1.1']

/** A promise, and what resolves it. */
function event (): { happened: Promise<void>, happen: () => void } {
  let happen = (): void => {}
  const happened = new Promise<void>(resolve => { happen = resolve })
  return { happened, happen }
}

/** Reads until the text has come. */
async function received (socket: Socket, expected: string): Promise<void> {
  let got = ''
  while (!got.includes(expected)) got += String(await once(socket, 'data'))
}

async function read (client: Client, path: string, method = 'GET', body = ''): Promise<{ status: number, body: string }> {
  const answer = await client.send(path, method, body).answer
  return { status: answer.status, body: await text(answer.body) }
}

t.test('pipelining', async t => {
  /** A slow request and a fast one behind it, which has replied and waits for its turn. */
  async function pipeline (t: Test) {
    const app = await build(t)
    const slow = new Witness()
    const fast = new Witness()
    const [release, replied, lost] = [event(), event(), event()]
    app.get('/slow', async request => {
      slow.add(request, 'slow')
      request.raw.socket.once('close', lost.happen)
      await release.happened
      return 'slow is done'
    })
    app.get('/fast', (request, reply) => {
      fast.add(request, 'fast')
      reply.send('fast is done')
      replied.happen()
    })
    const socket = await connectRaw(t, app)
    socket.write(requestText('/slow') + requestText('/fast'))
    await replied.happened
    await turn(app)
    return { app, socket, slow, fast, release: release.happen, lost: lost.happened }
  }

  await t.test('tasks of a response that waits for its turn wait with it', async t => {
    const { app, socket, slow, fast, release } = await pipeline(t)
    t.strictSame([slow.take(), fast.take()], [[], []])
    release()
    await received(socket, 'fast is done')
    await app.backgroundTasks.idle()
    t.strictSame([slow.take(), fast.take()], [['slow'], ['fast']])
    t.strictSame([slow.outcome, fast.outcome], [COMPLETE, COMPLETE])
  })

  for (const end of ['destroy', 'resetAndDestroy', 'end'] as const) {
    await t.test(`tasks of a response that never has its turn run when the client is gone (${end})`, async t => {
      const { app, socket, slow, fast, release, lost } = await pipeline(t)
      socket[end]()
      await lost
      await turn(app)
      t.strictSame([slow.take(), fast.take()], [[], ['fast']])
      release()
      await app.backgroundTasks.idle()
      t.strictSame([slow.take(), fast.take()], [['slow'], []])
      t.strictSame([slow.outcome, fast.outcome], [ABORTED, ABORTED])
    })
  }

  await t.test('tasks of a handler that settles after the client is gone, its response never having had its turn', async t => {
    const app = await build(t)
    const witness = new Witness()
    const started = event()
    app.get('/first', async (_request, reply) => { await gone(reply) })
    app.get('/second', async request => {
      witness.add(request, 'task')
      started.happen()
      await once(request.raw.socket, 'close')
      await turn(app)
      witness.note('settled')
    })
    const socket = await connectRaw(t, app)
    socket.write(requestText('/first') + requestText('/second'))
    await started.happened
    socket.destroy()
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['settled', 'task'])
    t.strictSame(witness.outcome, ABORTED)
  })

  await t.test('a kept-alive connection collects no listeners', async t => {
    const app = await build(t)
    const witness = new Witness()
    let listeners = 0
    app.get('/', async request => {
      // Read before this request has an exchange: what those before it have left.
      listeners = request.raw.socket.listenerCount('close')
      witness.add(request, 'task')
      return 'done'
    })
    const socket = await connectRaw(t, app)
    const counts = new Set<number>()
    for (let i = 0; i < 3; i++) {
      socket.write(requestText('/') + requestText('/'))
      let bodies = 0
      while (bodies < 2) bodies += String(await once(socket, 'data')).split('done').length - 1
      await app.backgroundTasks.idle()
      counts.add(listeners)
    }
    t.equal(witness.take().length, 6)
    t.equal(counts.size, 1)
  })
})

t.test('a client that wants its connection closed behind the response has not aborted', async t => {
  const app = await build(t)
  const witness = new Witness()
  app.get('/', async request => {
    witness.add(request, 'task')
    return 'done'
  })
  for (const text of ['GET / HTTP/1.0\r\n\r\n', 'GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n']) {
    const socket = await connectRaw(t, app)
    socket.write(text)
    await received(socket, 'done')
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['task'])
    t.strictSame(witness.outcome, COMPLETE)
  }
})

t.test('a client that half-closes its connection has aborted', async t => {
  const app = await build(t)
  const witness = new Witness()
  const started = event()
  app.get('/', async (request, reply) => {
    witness.add(request, 'task')
    started.happen()
    await gone(reply)
    witness.note('settled')
    return 'nobody reads this'
  })
  const socket = await connectRaw(t, app)
  socket.write(requestText('/'))
  await started.happened
  socket.end()
  await app.backgroundTasks.idle()
  t.strictSame(witness.take(), ['settled', 'task'])
  t.strictSame(witness.outcome, ABORTED)
})

t.test('a client that disconnects while it sends the body: Fastify fails the request', async t => {
  const app = await build(t)
  const witness = new Witness()
  const started = event()
  app.addHook('preParsing', async request => {
    witness.add(request, 'task')
    started.happen()
  })
  app.addHook('onRequestAbort', async request => { witness.add(request, 'task of onRequestAbort') })
  app.post('/', async () => { t.fail('the handler does not run') })
  const socket = await connectRaw(t, app)
  socket.write(requestText('/', 'POST', 'a body').slice(0, -1))
  await started.happened
  await turn(app)
  socket.destroy()
  await app.backgroundTasks.idle()
  t.equal(witness.take()[0], 'task')
  t.match(witness.outcome, { statusCode: 400, failed: true, aborted: true })
})

t.test('an HTTP/2 session that ends takes its streams along', async t => {
  const app = await build(t, { http2: true })
  const witness = new Witness()
  const started = event()
  app.get('/', async (request, reply) => {
    witness.add(request, 'task')
    started.happen()
    await gone(reply)
    witness.note('settled')
  })
  const session = http2.connect(`http://127.0.0.1:${await listen(app)}`)
  session.request({ ':path': '/' }).on('error', () => {})
  await started.happened
  session.destroy()
  await app.backgroundTasks.idle()
  t.strictSame(witness.take(), ['settled', 'task'])
  t.strictSame(witness.outcome, ABORTED)
})

t.test('connectionTimeout is an abort', async t => {
  const app = await build(t, { connectionTimeout: 30 })
  const witness = new Witness()
  const settled = event()
  app.get('/', async (request, reply) => {
    witness.add(request, 'task')
    await gone(reply)
    witness.note('settled')
    settled.happen()
    return 'too late'
  })
  await t.rejects((await http1.connect(t, app)).send('/').answer)
  await settled.happened
  await app.backgroundTasks.idle()
  t.strictSame(witness.take(), ['settled', 'task'])
  t.strictSame(witness.outcome, ABORTED)
})

t.test('handlerTimeout is a failure and settles the exchange; what the handler adds afterwards is late', { skip: beforeFastify('5.8.0', 'it has no handlerTimeout') }, async t => {
  for (const transport of [http1, transports['HTTP/2']]) {
    const app = await build(t, transport.server)
    const witness = new Witness()
    const [released, done] = [event(), event()]
    let skipped: string | undefined
    app.get('/', { handlerTimeout: 20 }, async request => {
      witness.add(request, 'task')
      await released.happened
      witness.add(request, 'late task')
      const ofSuccess = request.backgroundTasks.addTask(() => {})
      await turn(app)
      skipped = ofSuccess.state
      done.happen()
      return 'too late'
    })
    t.equal((await read(await transport.connect(t, app), '/')).status, 503)
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['task'])
    t.match(witness.outcome, { statusCode: 503, failed: true, error: { code: 'FST_ERR_HANDLER_TIMEOUT' }, aborted: false })
    released.happen()
    await done.happened
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['late task'])
    t.equal(skipped, 'skipped', 'the outcome decides for late tasks too')
  }
})

t.test('tasks that come when the exchange has ended run, whether or not any came before', async t => {
  for (const transport of [http1, transports['HTTP/2']]) {
    const app = await build(t, transport.server)
    const witness = new Witness()
    const over = event()
    app.addHook('onResponse', (request, _reply, done) => {
      witness.add(request, 'task of onResponse')
      done()
    })
    app.get('/', async () => 'done')
    app.get('/afterwards', {
      async onRequest (request, reply) {
        reply.raw.once('close', () => {
          process.nextTick(() => {
            witness.add(request, 'task from nowhere')
            over.happen()
          })
        })
      }
    }, async () => 'done')
    const client = await transport.connect(t, app)
    await read(client, '/')
    await turn(app)
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['task of onResponse'])
    t.strictSame(witness.outcome, COMPLETE)
    await read(client, '/afterwards')
    await over.happened
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['task of onResponse', 'task from nowhere'])
    t.strictSame(witness.outcome, COMPLETE)
  }
})

t.test('routes of every method', async t => {
  const app = await build(t)
  const witness = new Witness()
  // Node 20 does not know QUERY on the wire.
  const methods = app.supportedMethods.filter(method => METHODS.includes(method))
  app.route({
    method: methods,
    url: '/',
    async handler (request) {
      witness.add(request, request.method)
      return 'done'
    }
  })
  const client = await http1.connect(t, app)
  for (const method of methods) {
    const hasBody = ['POST', 'PUT', 'PATCH', 'QUERY'].includes(method)
    t.equal((await read(client, '/', method, hasBody ? 'body' : '')).status, 200, method)
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), [method])
    t.strictSame(witness.outcome, COMPLETE)
  }
  t.ok(methods.length >= 8)
})

t.test('not-found handlers', async t => {
  const app = await build(t)
  const witness = new Witness()
  app.addHook('onRequest', async request => { witness.add(request, 'hook task') })
  app.get('/called', (_request, reply) => { reply.callNotFound() })
  await app.register(async child => {
    child.setNotFoundHandler(async (request, reply) => {
      witness.add(request, 'handler task')
      return reply.code(404).send('ours')
    })
  }, { prefix: '/ours' })
  const client = await http1.connect(t, app)
  for (const [path, events] of [['/nowhere', ['hook task']], ['/called', ['hook task']], ['/ours/nowhere', ['hook task', 'handler task']]] as const) {
    t.equal((await read(client, path)).status, 404)
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), events)
    t.strictSame(witness.outcome, { ...COMPLETE, statusCode: 404 }, 'not found is no failure')
  }
})

t.test('encapsulated plugins, registered before and after this one', async t => {
  const app = bare(t)
  const witness = new Witness()
  const routes: FastifyPluginAsync = async child => {
    child.addHook('preHandler', async request => { witness.add(request, 'hook task') })
    child.get('/', async request => {
      witness.add(request, 'handler task')
      return 'done'
    })
    child.get('/throws', async () => { throw FAILURE })
    child.get('/throws/undefined', async () => { throw undefined }) // eslint-disable-line no-throw-literal
    child.get('/aborted', async (request, reply) => {
      witness.add(request, 'handler task')
      reply.raw.destroy()
      await gone(reply)
      return 'too late'
    })
  }
  app.register(routes, { prefix: '/before' })
  app.register(async child => { child.register(routes, { prefix: '/nested' }) }, { prefix: '/before' })
  app.register(backgroundTasks)
  app.register(routes, { prefix: '/after' })
  app.register(async child => { child.register(routes, { prefix: '/nested' }) }, { prefix: '/after' })
  await app.ready()

  for (const prefix of ['/before', '/before/nested', '/after', '/after/nested']) {
    const client = await http1.connect(t, app)
    const see = async (path: string, events: string[], outcome: object): Promise<void> => {
      await read(client, prefix + path).catch(() => {})
      await app.backgroundTasks.idle()
      t.strictSame(witness.take(), events, prefix + path)
      t.strictSame(witness.outcome, outcome, prefix + path)
    }
    await see('', ['hook task', 'handler task'], COMPLETE)
    await see('/throws', ['hook task'], FAILED)
    await see('/throws/undefined', ['hook task'], { ...FAILED, error: undefined })
    await see('/aborted', ['hook task', 'handler task'], ABORTED)
  }
})

t.test('registered in an encapsulated plugin, it belongs to that plugin and its children', async t => {
  const app = bare(t)
  const witness = new Witness()
  let owner: FastifyInstance | undefined
  app.get('/outside', async request => ({ has: 'backgroundTasks' in request }))
  app.register(async child => {
    owner = child
    await child.register(backgroundTasks)
    child.get('/inside', async request => {
      witness.add(request, 'task')
      throw FAILURE
    })
  })
  const client = await http1.connect(t, app)
  t.equal((await read(client, '/outside')).body, '{"has":false}')
  t.equal((await read(client, '/inside')).status, 500)
  await owner?.backgroundTasks.idle()
  t.strictSame(witness.take(), ['task'])
  t.strictSame(witness.outcome, FAILED)
})

t.test('hooks of other plugins that throw lose no tasks', async t => {
  const app = bare(t)
  const witness = new Witness()
  app.addHook('onResponse', async () => { throw new Error('onResponse before') })
  app.addHook('onResponse', () => { throw new Error('onResponse before') })
  app.addHook('onError', async () => { throw new Error('onError before') })
  await app.register(backgroundTasks)
  app.addHook('onResponse', async () => { throw new Error('onResponse after') })
  app.get('/', async request => {
    witness.add(request, 'task')
    return 'done'
  })
  app.get('/throws', async request => {
    witness.add(request, 'task')
    throw FAILURE
  })
  const client = await http1.connect(t, app)
  for (const [path, outcome] of [['/', COMPLETE], ['/throws', FAILED]] as const) {
    await read(client, path)
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['task'])
    t.strictSame(witness.outcome, outcome)
  }
})

t.test('websocket routes', async t => {
  for (const order of ['before', 'after']) {
    await t.test(`@fastify/websocket registered ${order} this plugin`, async t => {
      const app = bare(t)
      const witness = new Witness()
      const closed = event()
      if (order === 'before') await app.register(websocket)
      await app.register(backgroundTasks)
      if (order === 'after') await app.register(websocket)
      app.addHook('preHandler', async (request, reply) => {
        witness.add(request, 'hook task')
        if (request.headers.authorization === undefined) return reply.code(401).send('who are you?')
      })
      app.get('/', { websocket: true }, (socket, request) => {
        witness.note('upgraded')
        witness.add(request, 'handler task')
        socket.on('message', () => {
          witness.add(request, 'message task')
          socket.send('got it')
        })
        socket.on('close', () => {
          witness.add(request, 'close task')
          closed.happen()
        })
      })
      app.get('/plain', async () => 'no websockets here')
      const url = `ws://127.0.0.1:${await listen(app)}`
      const upgraded = { ...COMPLETE, statusCode: 101 }

      const client = new WebSocket(url, { headers: { authorization: 'me' } })
      await once(client, 'open')
      await app.backgroundTasks.idle()
      t.strictSame(witness.take(), ['upgraded', 'hook task', 'handler task'])
      t.strictSame(witness.outcome, upgraded)
      client.send('hello')
      await once(client, 'message')
      await app.backgroundTasks.idle()
      t.strictSame(witness.take(), ['message task'])
      client.terminate()
      await closed.happened
      await app.backgroundTasks.idle()
      t.strictSame(witness.take(), ['close task'])
      t.strictSame(witness.outcome, upgraded, 'the end of the socket is no abort')

      const refused = new WebSocket(url)
      const [error] = await once(refused, 'error') as [Error]
      t.match(error.message, '401')
      await app.backgroundTasks.idle()
      t.strictSame(witness.take(), ['hook task'])
      t.strictSame(witness.outcome, { ...COMPLETE, statusCode: 401 })

      const plain = await http1.connect(t, app)
      t.equal((await read(plain, '/plain')).status, 401)
      await app.backgroundTasks.idle()
      t.strictSame(witness.take(), ['hook task'])
      t.strictSame(witness.outcome, { ...COMPLETE, statusCode: 401 })
    })
  }

  await t.test('an upgrade that ws refuses', async t => {
    const app = await build(t)
    const witness = new Witness()
    await app.register(websocket)
    app.get('/', { websocket: true, preHandler: async request => { witness.add(request, 'task') } }, () => { t.fail('not upgraded') })
    const request = http.request({ port: await listen(app), host: '127.0.0.1', headers: { connection: 'upgrade', upgrade: 'websocket' } })
    request.end()
    const [response] = await once(request, 'response') as [http.IncomingMessage]
    response.resume()
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['task'])
    t.strictSame(witness.outcome, { ...COMPLETE, statusCode: 400 })
  })

  await t.test('an upgrade answered by hand', async t => {
    const app = await build(t)
    const witness = new Witness()
    app.server.on('upgrade', (request, socket) => {
      app.routing(request, new http.ServerResponse(request))
      socket.on('end', () => { socket.end() })
    })
    app.get('/', (request, reply) => {
      reply.hijack()
      request.raw.socket.write('HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: own\r\n\r\n')
      witness.add(request, 'task')
    })
    const request = http.request({ port: await listen(app), host: '127.0.0.1', headers: { connection: 'upgrade', upgrade: 'own' } })
    request.end()
    const [, socket] = await once(request, 'upgrade') as [http.IncomingMessage, Socket]
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['task'])
    t.strictSame(witness.outcome, { ...COMPLETE, statusCode: 101 })
    socket.destroy()
  })

  for (const [name, wait] of [['returns', undefined], ['waits for the end of the socket', async (socket: Socket) => { await once(socket, 'close') }]] as const) {
    await t.test(`an upgrade answered by hand, its reply never hijacked, by a handler that ${name}`, async t => {
      const app = await build(t)
      const witness = new Witness()
      app.server.on('upgrade', (request, socket) => {
        app.routing(request, new http.ServerResponse(request))
        socket.on('end', () => { socket.end() })
      })
      app.get('/', (request): Promise<void> | undefined => {
        const { socket } = request.raw
        witness.add(request, 'task')
        socket.write('HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: own\r\n\r\n')
        return wait?.(socket)
      })
      const request = http.request({ port: await listen(app), host: '127.0.0.1', headers: { connection: 'upgrade', upgrade: 'own' } })
      request.end()
      const [, socket] = await once(request, 'upgrade') as [http.IncomingMessage, Socket]
      t.teardown(() => { socket.destroy() })
      await endsSoon(t, app, witness, { ...COMPLETE, statusCode: 101 }, 'the upgrade')
    })
  }

  await t.test('injectWS', async t => {
    const app = await build(t)
    const witness = new Witness()
    await app.register(websocket)
    app.get('/', { websocket: true }, (_socket, request) => { witness.add(request, 'task') })
    await app.ready()
    const client = await app.injectWS('/')
    t.teardown(() => { client.terminate() })
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['task'])
    t.strictSame(witness.outcome, { ...COMPLETE, statusCode: 101 })
  })
})
