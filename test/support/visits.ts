/** Visits over real sockets: each exchange has one task, which runs once, soon, and sees the outcome. */
import { once } from 'node:events'
import http, { type IncomingHttpHeaders, type IncomingMessage } from 'node:http'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import type { FastifyInstance } from 'fastify'
import type { Test } from 'tap'
import type { ExchangeOutcome } from '../../lib/index.js'
import { listen, turn, type Witness } from './sockets.js'

/** Far below the 10 s that an exchange without a sign takes, and above the second between two looks at an HTTP/2 stream. */
const SOON_MS = 4_000
const SILENT_MS = 8_000

export interface Answered {
  readonly status: number
  readonly headers: IncomingHttpHeaders
  readonly body: Buffer
}

export interface Visit {
  readonly path: string
  readonly method?: string
  readonly headers?: Record<string, string>
  readonly body?: string
  /** What the client waits for until it disconnects; `'in mid-answer'`: for the first bytes of a body. */
  readonly leaves?: Promise<unknown> | 'in mid-answer'
  readonly outcome: Partial<ExchangeOutcome> | object
  /** The names of the tasks, in the order in which they run. */
  readonly tasks?: string[]
}

/** Adds a task in an `onRequest` hook, whoever answers then. */
export function addTasks (app: FastifyInstance, witness: Witness): void {
  app.addHook('onRequest', (request, _reply, done) => {
    witness.add(request, 'task')
    done()
  })
}

/** Sends a request, reads the answer or disconnects, and sees how the exchange ends. */
export async function visit (t: Test, app: FastifyInstance, witness: Witness, plan: Visit): Promise<Answered | undefined> {
  const { path, leaves, outcome, tasks } = plan
  const { response, leave } = send(await listen(app), plan)
  let answered: Answered | undefined
  if (leaves === undefined) {
    answered = await read(await response)
  } else if (leaves === 'in mid-answer') {
    await once(await response, 'data')
    leave()
  } else {
    await leaves
    leave()
  }
  await endsSoon(t, app, witness, outcome, `${plan.method ?? 'GET'} ${path}`, tasks)
  return answered
}

/** The exchange ends once, soon, and with this outcome. */
export async function endsSoon (t: Test, app: FastifyInstance, witness: Witness, outcome: object, name: string, tasks = ['task']): Promise<void> {
  const idle = app.backgroundTasks.idle()
  const isSoon = await within(SOON_MS, idle)
  t.ok(isSoon, `${name}: the exchange ends soon`)
  if (!isSoon && !await within(SILENT_MS, idle)) throw new Error(`${name}: the exchange does not end`)
  await turn(app)
  t.strictSame(witness.take(), tasks, `${name}: the tasks run once`)
  t.match(witness.outcome, outcome, `${name}: the outcome`)
}

async function within (ms: number, promise: Promise<unknown>): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<boolean>(resolve => { timer = setTimeout(resolve, ms, false) })
  const isInTime = await Promise.race([late, promise.then(() => true)])
  clearTimeout(timer)
  return isInTime
}

/** A request on a connection of its own. */
export function send (port: number, { path, method = 'GET', headers = {}, body = '' }: Omit<Visit, 'outcome'>): { response: Promise<IncomingMessage>, leave: () => void } {
  const length = body === '' ? {} : { 'content-type': 'text/plain', 'content-length': String(body.length) }
  const request = http.request({ host: '127.0.0.1', port, path, method, headers: { ...length, ...headers }, agent: false })
  const response = once(request, 'response').then(([response]) => (response as IncomingMessage).on('error', () => {}))
  // A client that disconnects has none.
  response.catch(() => {})
  request.on('error', () => {})
  request.end(body)
  return { response, leave: () => { request.destroy() } }
}

export async function read (response: IncomingMessage): Promise<Answered> {
  return { status: response.statusCode ?? 0, headers: response.headers, body: await buffer(response) }
}

/** A body that never ends. */
export function endless (): Readable {
  return new Readable({ read () { this.push(Buffer.alloc(16_384, 'x')) } })
}
