/** Real clients for the tests of the exchange, and a witness of what the tasks of a request saw. */
import { generateKeyPairSync, sign } from 'node:crypto'
import { once } from 'node:events'
import http, { type IncomingMessage } from 'node:http'
import http2, { type ClientHttp2Stream } from 'node:http2'
import https from 'node:https'
import net, { type AddressInfo, type Socket } from 'node:net'
import type { Readable } from 'node:stream'
import Fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest, type FastifyServerOptions } from 'fastify'
import type { Test } from 'tap'
import backgroundTasks, { type ExchangeOutcome, type FastifyBackgroundTasksOptions } from '../../lib/index.js'

/** Fastify's options for a server of whatever protocol: its own types tie them to the type of the instance. */
export type ServerOptions = FastifyServerOptions & { http2?: boolean, https?: object | null }

export const FAILURE = new Error('the endpoint failed')
export const COMPLETE: ExchangeOutcome = { statusCode: 200, failed: false, aborted: false }
export const ABORTED: ExchangeOutcome = { ...COMPLETE, aborted: true }
export const FAILED: ExchangeOutcome = { statusCode: 500, failed: true, error: FAILURE, aborted: false }

/** An app with the plugin, closed when the test has ended. */
export async function build (t: Test, server: ServerOptions = {}, options: FastifyBackgroundTasksOptions = {}): Promise<FastifyInstance> {
  const app = bare(t, server)
  await app.register(backgroundTasks, options)
  return app
}

/** An app without the plugin. */
export function bare (t: Test, server: ServerOptions = {}): FastifyInstance {
  // Whichever protocol it speaks, the tests use of it what all servers have.
  const app = Fastify({ forceCloseConnections: true, ...server } as FastifyServerOptions)
  t.teardown(() => app.close())
  return app
}

/** Resolves when every list that is ready by now has had its turn. */
export function turn (app: FastifyInstance): Promise<void> {
  return new Promise(resolve => { app.backgroundTasks.addTask(resolve) })
}

/** Resolves when the response is closed and a list that this made ready has had its turn. */
export async function gone (reply: FastifyReply): Promise<void> {
  await once(reply.raw, 'close')
  await turn(reply.server)
}

/** What happened, in order: a request's tasks by their names, and what a test notes itself. */
export class Witness {
  /** The outcome that the last task has seen. */
  outcome: ExchangeOutcome | undefined
  #events: string[] = []

  /** Adds a task that runs whatever the outcome is. */
  add (request: FastifyRequest, name: string): void {
    request.backgroundTasks.with({ when: 'always', name }).addTask(() => {
      this.#events.push(name)
      this.outcome = request.backgroundTasks.outcome
    })
  }

  note (event: string): void {
    this.#events.push(event)
  }

  /** What has happened since it was last asked. */
  take (): string[] {
    return this.#events.splice(0)
  }
}

export interface Answer {
  readonly status: number
  readonly body: Readable
}

/** A request on its way. */
export interface Pending {
  /** Resolves at the head of the response; whoever wants the body reads it. */
  readonly answer: Promise<Answer>
  /** As the user of a browser does: closes the connection, or resets the stream. */
  hangUp: () => void
}

export interface Client {
  send: (path: string, method?: string, body?: string, headers?: Record<string, string>) => Pending
}

/** How to speak to an app. */
export interface Transport {
  readonly server: ServerOptions
  readonly connect: (t: Test, app: FastifyInstance) => Promise<Client>
}

export const transports = {
  'HTTP/1.1': { server: {}, connect: (t, app) => connect1(t, app, http) },
  HTTPS: { server: { https: selfSigned() }, connect: (t, app) => connect1(t, app, https) },
  'HTTP/2': { server: { http2: true }, connect: (t, app) => connect2(t, app, 'http') },
  'HTTP/2 over TLS': { server: { http2: true, https: selfSigned() }, connect: (t, app) => connect2(t, app, 'https') }
} satisfies Record<string, Transport>

/** A bare TCP connection, for what a client's library does not do: pipelining, half-closing, resetting. */
export async function connectRaw (t: Test, app: FastifyInstance): Promise<Socket> {
  const socket = net.connect(await listen(app), '127.0.0.1')
  t.teardown(() => { socket.destroy() })
  socket.setEncoding('latin1')
  socket.on('error', () => {})
  await once(socket, 'connect')
  return socket
}

/** The text of a request. */
export function requestText (path: string, method = 'GET', body = ''): string {
  const headers = body === '' ? '' : `content-type: text/plain\r\ncontent-length: ${body.length}\r\n`
  return `${method} ${path} HTTP/1.1\r\nhost: test\r\n${headers}\r\n${body}`
}

/** The port of the app, which listens from now on. */
export async function listen (app: FastifyInstance): Promise<number> {
  if (!app.server.listening) await app.listen({ host: '127.0.0.1', port: 0 })
  return (app.server.address() as AddressInfo).port
}

async function connect1 (t: Test, app: FastifyInstance, protocol: typeof http | typeof https): Promise<Client> {
  const port = await listen(app)
  // One connection, kept alive: each request waits for the one before.
  const agent = new protocol.Agent({ keepAlive: true, maxSockets: 1 })
  t.teardown(() => { agent.destroy() })

  return {
    send (path, method = 'GET', body = '', others = {}) {
      const headers = body === '' ? others : { 'content-type': 'text/plain', 'content-length': body.length, ...others }
      const request = protocol.request({ host: '127.0.0.1', port, path, method, headers, agent, rejectUnauthorized: false } as object)
      request.end(body)
      const answer = (async () => {
        const [response] = await once(request, 'response') as [IncomingMessage]
        return { status: response.statusCode ?? 0, body: response }
      })()
      return pending(answer, () => { request.destroy() })
    }
  }
}

async function connect2 (t: Test, app: FastifyInstance, scheme: string): Promise<Client> {
  const session = http2.connect(`${scheme}://127.0.0.1:${await listen(app)}`, { rejectUnauthorized: false })
  t.teardown(() => { session.destroy() })
  await once(session, 'connect')

  return {
    send (path, method = 'GET', body = '', others = {}) {
      const headers = body === '' ? others : { 'content-type': 'text/plain', ...others }
      const stream: ClientHttp2Stream = session.request({ ':path': path, ':method': method, ...headers }, { endStream: body === '' })
      if (body !== '') stream.end(body)
      const answer = (async () => {
        const closed = once(stream, 'close').then(() => { throw new Error('no response') })
        closed.catch(() => {})
        const [head] = await Promise.race([once(stream, 'response'), closed]) as [http2.IncomingHttpHeaders & http2.IncomingHttpStatusHeader]
        return { status: head[':status'] ?? 0, body: stream }
      })()
      stream.on('error', () => {})
      return pending(answer, () => { stream.close(http2.constants.NGHTTP2_CANCEL) })
    }
  }
}

function pending (answer: Promise<Answer>, hangUp: () => void): Pending {
  // A request that was hung up on has none.
  answer.catch(() => {})
  return { answer, hangUp }
}

/** A certificate for this run, so that no key lies in the repository. Node makes keys, but no X.509: it takes a few lines. */
function selfSigned (): { key: string, cert: string } {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const der = (tag: number, ...parts: Buffer[]): Buffer => {
    const value = Buffer.concat(parts)
    const length = value.length < 0x80 ? [value.length] : value.length < 0x100 ? [0x81, value.length] : [0x82, value.length >> 8, value.length & 0xff]
    return Buffer.concat([Buffer.from([tag, ...length]), value])
  }
  const sequence = (...parts: Buffer[]): Buffer => der(0x30, ...parts)
  const oid = (hex: string): Buffer => der(0x06, Buffer.from(hex, 'hex'))
  const time = (text: string): Buffer => der(0x18, Buffer.from(text))

  const algorithm = sequence(oid('2a8648ce3d040302')) // ecdsa-with-SHA256
  const name = sequence(der(0x31, sequence(oid('550403'), der(0x0c, Buffer.from('localhost'))))) // CN=localhost
  const validity = sequence(time('20200101000000Z'), time('21000101000000Z'))
  const serial = der(0x02, Buffer.from([1]))
  const body = sequence(serial, algorithm, name, validity, name, publicKey.export({ type: 'spki', format: 'der' }))
  const signature = der(0x03, Buffer.from([0]), sign('sha256', body, privateKey))
  const certificate = sequence(body, algorithm, signature).toString('base64')
  return {
    key: privateKey.export({ type: 'pkcs8', format: 'pem' }).toString(),
    cert: `-----BEGIN CERTIFICATE-----\n${certificate.replace(/.{64}/g, '$&\n')}\n-----END CERTIFICATE-----\n`
  }
}
