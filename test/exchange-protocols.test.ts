/**
 * When the tasks of a request run, and with which outcome: once its handler has settled and its response is over. The rules
 * that are the same on every protocol; what only some have is in exchange.test.ts.
 */
import { once } from 'node:events'
import { PassThrough, Readable } from 'node:stream'
import { text } from 'node:stream/consumers'
import { pipeline } from 'node:stream/promises'
import { setImmediate } from 'node:timers/promises'
import type { FastifyInstance, FastifyReply, FastifyRequest, onSendHookHandler, RouteShorthandOptions } from 'fastify'
import t, { type Test } from 'tap'
import { beforeFastify } from './support/fastify-version.js'
import {
  ABORTED, build, COMPLETE, FAILED, FAILURE, gone, transports, turn, Witness, type Transport
} from './support/sockets.js'

interface Style {
  /** A handler that waits for `ready`, calls `settle`, and ends at once. */
  readonly handler: (request: FastifyRequest, reply: FastifyReply, ready: Promise<void>, settle: () => void) => unknown
  readonly statusCode: number
  readonly failed?: boolean
  readonly error?: unknown
  /** Whether there is no response if the client stays. */
  readonly needsAbort?: boolean
  /** Whether the abort itself can end the exchange: a returned reply settles then, on some protocols and versions of Node. */
  readonly endsAtAbort?: boolean
  readonly endsAtOnce?: boolean
}

/** The ways in which a handler ends. */
const styles: Record<string, Style> = {
  'returns a value': {
    statusCode: 200,
    async handler (_request, _reply, ready, settle) {
      await ready
      settle()
      return { ok: true }
    }
  },
  'returns a value at once': {
    statusCode: 200,
    endsAtOnce: true,
    handler (_request, _reply, _ready, settle) {
      settle()
      return { ok: true }
    }
  },
  'returns a stream': {
    statusCode: 200,
    async handler (_request, _reply, ready, settle) {
      await ready
      settle()
      return Readable.from(['one', 'two'])
    }
  },
  'returns undefined': {
    statusCode: 200,
    async handler (_request, _reply, ready, settle) {
      await ready
      settle()
    }
  },
  throws: {
    statusCode: 500,
    failed: true,
    error: FAILURE,
    async handler (_request, _reply, ready, settle) {
      await ready
      settle()
      throw FAILURE
    }
  },
  'throws undefined': {
    statusCode: 500,
    failed: true,
    error: undefined,
    async handler (_request, _reply, ready, settle) {
      await ready
      settle()
      // What a mistaken `Promise.reject()` does.
      throw undefined // eslint-disable-line no-throw-literal
    }
  },
  'sends an error': {
    statusCode: 500,
    failed: true,
    error: FAILURE,
    handler (_request, reply, ready, settle) {
      void ready.then(() => {
        settle()
        reply.send(FAILURE)
      })
    }
  },
  'sets a status by hand': {
    statusCode: 404,
    async handler (_request, reply, ready, settle) {
      await ready
      settle()
      return reply.code(404).send('nothing here')
    }
  },
  'calls reply.send from a callback': {
    statusCode: 200,
    handler (_request, reply, ready, settle) {
      void ready.then(() => {
        setTimeout(() => {
          settle()
          reply.send('sent')
        }, 1)
      })
    }
  },
  'returns the reply and sends from a callback': {
    statusCode: 200,
    endsAtAbort: true,
    handler (_request, reply, ready, settle) {
      void ready.then(() => {
        settle()
        reply.send('sent')
      })
      return reply
    }
  },
  'returns the reply from an async function and sends from a callback': {
    statusCode: 200,
    endsAtAbort: true,
    async handler (_request, reply, ready, settle) {
      void ready.then(() => {
        settle()
        reply.send('sent')
      })
      return reply
    }
  },
  'awaits a reply that was sent': {
    statusCode: 200,
    async handler (_request, reply, ready, settle) {
      await ready
      settle()
      reply.send('sent')
      await reply
    }
  },
  'awaits a reply that is never sent': {
    statusCode: 200,
    needsAbort: true,
    async handler (_request, reply, _ready, settle) {
      await reply
      settle()
    }
  },
  'hijacks and ends the raw response': {
    statusCode: 202,
    async handler (_request, reply, ready, settle) {
      await ready
      settle()
      reply.code(202).hijack()
      reply.raw.end('raw')
    }
  },
  'ends the raw response without hijacking': {
    statusCode: 202,
    async handler (_request, reply, ready, settle) {
      await ready
      settle()
      reply.raw.statusCode = 202
      reply.raw.end('raw')
    }
  }
}

interface Response extends RouteShorthandOptions {
  readonly handler: (request: FastifyRequest, reply: FastifyReply) => unknown
  readonly outcome: object
  /** Whether the client disconnects when it has the head. */
  readonly hangUp?: boolean
  /** Why the Fastify of this run cannot do it. */
  readonly skip?: string | false
}

/** What else a response can be. */
const responses: Record<string, Response> = {
  'a status of 204': {
    outcome: { ...COMPLETE, statusCode: 204 },
    handler: async (_request, reply) => reply.code(204).send()
  },
  'a redirect': {
    outcome: { ...COMPLETE, statusCode: 302 },
    handler: async (_request, reply) => reply.redirect('/elsewhere')
  },
  'a status of 500 set by hand': {
    outcome: { ...COMPLETE, statusCode: 500 },
    handler: async (_request, reply) => reply.code(500).send('no error was thrown')
  },
  'a preHandler hook that replies': {
    outcome: { ...COMPLETE, statusCode: 401 },
    preHandler: async (_request, reply) => reply.code(401).send('who are you?'),
    handler: async () => 'not called'
  },
  'a preHandler hook that throws': {
    outcome: FAILED,
    preHandler: async () => { throw FAILURE },
    handler: async () => 'not called'
  },
  'an onSend hook that throws': {
    outcome: FAILED,
    onSend: async (_request, reply) => { if (reply.statusCode === 200) throw FAILURE },
    handler: async () => 'fine'
  },
  'an error that an error handler answers with 200': {
    outcome: { ...FAILED, statusCode: 200 },
    errorHandler (_error, _request, reply) { reply.code(200).send('never mind') },
    handler: async () => { throw FAILURE }
  },
  'a string that was thrown': {
    outcome: { ...FAILED, error: 'only a string', statusCode: 418 },
    errorHandler (_error, _request, reply) { reply.code(418).send() },
    handler: async () => { throw 'only a string' } // eslint-disable-line no-throw-literal
  },
  'a stream that fails before its first byte': {
    outcome: FAILED,
    handler: async () => new Readable({ read () { this.destroy(FAILURE) } })
  },
  'a stream that fails behind its first byte': {
    outcome: ABORTED,
    handler: async () => Readable.from(breakingOff())
  },
  'a web stream that fails behind its first byte': {
    outcome: ABORTED,
    handler: async () => Readable.toWeb(Readable.from(breakingOff()))
  },
  'a stream whose reader disconnects': {
    outcome: ABORTED,
    hangUp: true,
    async handler () {
      const stream = new PassThrough()
      stream.write('first')
      return stream
    }
  },
  'a hijacked response whose reader disconnects': {
    outcome: ABORTED,
    hangUp: true,
    handler (_request, reply) {
      reply.hijack()
      reply.raw.write('first')
    }
  },
  'a response that has ended and waits for a reader who disconnects': {
    outcome: ABORTED,
    hangUp: true,
    handler (_request, reply) {
      reply.hijack()
      reply.raw.end(Buffer.alloc(32 * 1024 * 1024))
    }
  },
  'a pipeline whose reader disconnects': {
    outcome: { ...ABORTED, statusCode: 500 },
    hangUp: true,
    skip: beforeFastify('5.12.8', 'there an error after the head of the response is an unhandled rejection, without any plugin as well'),
    async handler (_request, reply) {
      const stream = new PassThrough()
      stream.write('first')
      await pipeline(stream, reply.raw)
    }
  },
  'a response that the handler destroys': {
    outcome: ABORTED,
    handler: async (_request, reply) => { reply.raw.destroy() }
  },
  'a response that the handler destroys and then sends': {
    outcome: ABORTED,
    handler (_request, reply) {
      reply.raw.destroy()
      reply.send('too late')
    }
  },
  'a connection that the handler destroys before it sends': {
    outcome: ABORTED,
    handler (request, reply) {
      request.raw.socket.destroy()
      reply.send('too late')
    }
  }
}

function pathOf (name: string): string {
  return `/${name.replaceAll(' ', '-')}`
}

async function * breakingOff (): AsyncGenerator<Buffer> {
  yield Buffer.from('first')
  await setImmediate()
  throw FAILURE
}

/** A route in a style, with a task from a hook and one from the handler. */
function addRoute (app: FastifyInstance, style: Style, witness: Witness, ready: (reply: FastifyReply) => Promise<void>): void {
  app.route({
    method: ['GET', 'POST'],
    url: '/',
    onRequest: async request => { witness.add(request, 'hook task') },
    handler (request, reply) {
      witness.add(request, 'handler task')
      return style.handler(request, reply, ready(reply), () => { witness.note('settled') })
    }
  })
}

function outcomeOf ({ statusCode, failed = false, error }: Style, aborted: boolean): object {
  return { statusCode, failed, ...(failed && { error }), aborted }
}

/** Sends a request, and disconnects when the app calls what `whenStarted` is given. */
async function abort (t: Test, app: FastifyInstance, transport: Transport, method: string, whenStarted: (start: () => void) => void): Promise<void> {
  const client = await transport.connect(t, app)
  const started = new Promise<void>(resolve => { whenStarted(resolve) })
  const request = client.send('/', method, method === 'POST' ? 'body' : '')
  await started
  request.hangUp()
}

for (const [protocol, transport] of Object.entries<Transport>(transports)) {
  t.test(`${protocol}: tasks run once, in order, when the handler has settled and the response is finished`, async t => {
    for (const [name, style] of Object.entries(styles)) {
      if (style.needsAbort === true) continue
      await t.test(`a handler that ${name}`, async t => {
        const app = await build(t, transport.server)
        const witness = new Witness()
        addRoute(app, style, witness, () => turn(app))
        const client = await transport.connect(t, app)
        for (const method of ['GET', 'HEAD', 'POST']) {
          const { status, body } = await client.send('/', method, method === 'POST' ? 'body' : '').answer
          await text(body)
          await app.backgroundTasks.idle()
          t.equal(status, style.statusCode)
          t.strictSame(witness.take(), ['settled', 'hook task', 'handler task'], method)
          t.strictSame(witness.outcome, outcomeOf(style, false))
        }
      })
    }
  })

  t.test(`${protocol}: when the client disconnects while the handler runs, tasks wait for the handler`, async t => {
    for (const [name, style] of Object.entries(styles)) {
      if (style.endsAtOnce === true) continue
      await t.test(`a handler that ${name}`, async t => {
        const app = await build(t, transport.server)
        const witness = new Witness()
        let start = (): void => {}
        addRoute(app, style, witness, reply => {
          start()
          return gone(reply)
        })
        for (const method of ['GET', 'POST']) {
          await abort(t, app, transport, method, resolve => { start = resolve })
          await app.backgroundTasks.idle()
          const events = witness.take()
          if (style.endsAtAbort === true) t.strictSame(events.filter(event => event !== 'settled'), ['hook task', 'handler task'], method)
          else t.strictSame(events, ['settled', 'hook task', 'handler task'], method)
          t.strictSame(witness.outcome, outcomeOf(style, true))
        }
      })
    }
  })

  t.test(`${protocol}: the response's last byte is on its way before a task starts`, async t => {
    const app = await build(t, transport.server)
    const witness = new Witness()
    let finished: boolean | undefined
    app.get('/', async (request, reply) => {
      request.backgroundTasks.addTask(() => { finished = reply.raw.writableFinished })
      witness.add(request, 'task')
      return Buffer.alloc(32 * 1024 * 1024)
    })
    const client = await transport.connect(t, app)
    const { body } = await client.send('/').answer
    await turn(app)
    t.strictSame(witness.take(), [], 'the client has the head, and does not read the rest')
    body.resume()
    await once(body, 'end')
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['task'])
    t.equal(finished, true)
    t.strictSame(witness.outcome, COMPLETE)

    const hungUp = client.send('/')
    await hungUp.answer
    hungUp.hangUp()
    await app.backgroundTasks.idle()
    t.strictSame(witness.take(), ['task'])
    t.strictSame(witness.outcome, ABORTED, 'a client that disconnects meanwhile has aborted')
  })

  t.test(`${protocol}: the outcome tells how the exchange ended`, async t => {
    const app = await build(t, transport.server)
    const witness = new Witness()
    app.addHook('onRequest', async request => { witness.add(request, 'task') })
    for (const [name, { handler, outcome, hangUp, skip, ...options }] of Object.entries(responses)) {
      app.get(pathOf(name), { ...options, handler })
    }
    for (const [name, { outcome, hangUp, skip = false }] of Object.entries(responses)) {
      if (skip !== false) {
        t.pass(name, { skip })
        continue
      }
      const client = await transport.connect(t, app)
      const { answer, hangUp: goAway } = client.send(pathOf(name))
      if (hangUp === true) {
        await answer
        goAway()
      } else {
        await answer.then(({ body }) => text(body)).catch(() => {})
      }
      await app.backgroundTasks.idle()
      t.strictSame(witness.take(), ['task'], name)
      t.strictSame(witness.outcome, outcome, name)
    }
  })
}

/** What comes behind a hook during which the client has hung up. */
interface Sequel {
  readonly hookEnds?: (reply: FastifyReply) => unknown
  readonly style: Style
  readonly onSend?: onSendHookHandler
  readonly events: string[]
  readonly outcome: object
}

function sequelsOf (hook: string, method: string): Record<string, Sequel> {
  const notCalled: Style = { statusCode: 200, handler: () => { throw new Error('the handler runs') } }
  const ofHook: Record<string, Sequel> = {
    'the hook replies': {
      hookEnds: reply => reply.code(401).send('who are you?'),
      style: notCalled,
      events: ['hook task'],
      outcome: { ...ABORTED, statusCode: 401 }
    },
    'the hook throws': {
      hookEnds () { throw FAILURE },
      style: notCalled,
      events: ['hook task'],
      outcome: { ...FAILED, aborted: true }
    }
  }
  // Fastify starts to read the body when it is gone, and waits ever after.
  if (hook === 'onRequest' && method === 'POST') {
    return { ...ofHook, 'the body never comes': { style: notCalled, events: ['hook task'], outcome: ABORTED } }
  }
  const events = ['settled', 'hook task', 'handler task']
  const ofHandler = Object.entries(styles)
    // `await reply` behind an abort resolves on HTTP/1.1 alone.
    .filter(([, { needsAbort, endsAtAbort }]) => needsAbort !== true && endsAtAbort !== true)
    .map(([name, style]) => [`the handler ${name}`, { style, events, outcome: outcomeOf(style, true) }])
  return {
    ...ofHook,
    ...Object.fromEntries(ofHandler),
    'what the handler returns cannot be sent': {
      style: styles['returns a value'] as Style,
      onSend (_request, _reply, _payload, done) { done(FAILURE) },
      events,
      outcome: { ...FAILED, aborted: true }
    }
  }
}

for (const protocol of ['HTTP/1.1', 'HTTP/2'] as const) {
  const transport = transports[protocol]
  for (const hook of ['onRequest', 'preHandler'] as const) {
    t.test(`${protocol}: when the client disconnects during ${hook}, tasks wait for what comes behind it`, async t => {
      for (const method of ['GET', 'POST']) {
        for (const [name, { hookEnds, style, onSend, events, outcome }] of Object.entries(sequelsOf(hook, method))) {
          await t.test(`${method}, ${name}`, async t => {
            const app = await build(t, transport.server)
            const witness = new Witness()
            let start = (): void => {}
            app.addHook(hook, async (request: FastifyRequest, reply: FastifyReply) => {
              witness.add(request, 'hook task')
              start()
              await gone(reply)
              return hookEnds?.(reply)
            })
            app.route({
              method,
              url: '/',
              ...(onSend && { onSend }),
              handler (request, reply) {
                witness.add(request, 'handler task')
                return style.handler(request, reply, turn(app), () => { witness.note('settled') })
              }
            })
            await abort(t, app, transport, method, resolve => { start = resolve })
            await app.backgroundTasks.idle()
            t.strictSame(witness.take(), events)
            t.strictSame(witness.outcome, outcome)
          })
        }
      }
    })
  }
}

t.test('inject: the response is there before any task has started', async t => {
  for (const [name, style] of Object.entries(styles)) {
    if (style.needsAbort === true) continue
    await t.test(`a handler that ${name}`, async t => {
      const app = await build(t)
      const witness = new Witness()
      addRoute(app, style, witness, () => turn(app))
      for (const method of ['GET', 'HEAD', 'POST'] as const) {
        const response = await app.inject({ method, url: '/', ...(method === 'POST' && { payload: 'body', headers: { 'content-type': 'text/plain' } }) })
        t.equal(response.statusCode, style.statusCode)
        t.strictSame(witness.take(), ['settled'])
        await app.backgroundTasks.idle()
        t.strictSame(witness.take(), ['hook task', 'handler task'])
        t.strictSame(witness.outcome, outcomeOf(style, false))
      }
    })
  }
})
