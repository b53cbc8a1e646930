/**
 * One HTTP request and its response, from the first task to its one end: it has ended when it is settled (the handler's
 * side is done) and over (the socket's side is done), whichever comes last.
 *
 * No hook tells this on every path: after an abort Fastify calls no `onResponse` (fastify/fastify#6208), and for an HTTP/2
 * reset it calls it before the handler is done. What does tell:
 * - settled: `reply.send` and `reply.hijack`, through which every reply goes, hook, handler and error handler alike; and
 *   the handler's promise, for one that ends with `undefined` after an abort, when Fastify sends nothing.
 * - over: `close` of the raw response. It follows the last byte handed to the socket, an abort, a reset and a timeout, and
 *   no other plugin can skip it. A pipelined response that never had its turn has only its socket's `close`.
 * - failed: the `onError` hook.
 *
 * A request that uses no tasks pays a few property writes and allocates nothing.
 */
import type { FastifyInstance, FastifyReply, FastifyRequest, RouteOptions } from 'fastify'
import { hasNoTurnYet, isComplete, isGone, isOfAbort, isUpgrade, onUpgradeAnswer, type RawResponse as Raw } from './connection.js'
import { isToBeRetried, RETRY_AFTER } from './errors.js'
import { instancesOf } from './instances.js'
import { isThenable } from './limits.js'

/** How an exchange ended. */
export interface ExchangeOutcome {
  /** The status code of the response, sent or not; 101 for an upgrade. */
  readonly statusCode: number
  /** Whether an error was thrown or sent on the way, also where an error handler then answered 200. */
  readonly failed: boolean
  /** The error of a failed exchange; `undefined` where `undefined` was thrown. */
  readonly error?: unknown
  /** Whether the connection or stream was gone before the response was complete. */
  readonly aborted: boolean
}

/** Who is told that an exchange has ended: the task list of its request. */
export interface ExchangeListener {
  exchangeEnded: () => void
  /** The reply will not pass `onSend`. */
  replyHijacked: () => void
}

const kExchange = Symbol('fastify-background-tasks.exchange')
const kReply = Symbol('fastify-background-tasks.reply')
const kReturned = Symbol('fastify-background-tasks.returned')
const kSettled = Symbol('fastify-background-tasks.settled')
const kFailure = Symbol('fastify-background-tasks.failure')

type RawRequest = FastifyRequest['raw'] & { [kExchange]?: Exchange }
type RawResponse = Raw & { [kExchange]?: Exchange }

// `undefined` can be thrown too, and is not to be mistaken for no failure.
const THREW_UNDEFINED = Symbol('fastify-background-tasks.threw-undefined')

const UNSETTLED = 0
const SETTLED = 1
const SETTLED_AFTER_ABORT = 2

/** What this file keeps on a request. In an encapsulated plugin registered before this one the decorations can be absent. */
interface Watched extends FastifyRequest {
  [kExchange]?: Exchange | null
  [kReply]?: FastifyReply | null
  /** What the handler returned. */
  [kReturned]?: unknown
  [kSettled]?: number
  [kFailure]?: unknown
}

export class Exchange {
  /** Undefined until the exchange has ended. */
  outcome: ExchangeOutcome | undefined
  readonly listener: ExchangeListener
  readonly request: Watched
  #over = false
  #aborted = false
  /** What a hijacked upgrade was answered with. */
  #upgradeStatus: number | undefined

  constructor (request: FastifyRequest, listener: ExchangeListener) {
    this.request = request
    this.listener = listener
    this.request[kExchange] = this
    const reply = this.request[kReply]
    if (reply != null) this.seen(reply)
    else if (!request.raw.readableEnded) watchBody(this)
  }

  /** The listener of a request's exchange, if it has one. */
  static listenerOf (request: FastifyRequest): ExchangeListener | undefined {
    return (request as Watched)[kExchange]?.listener
  }

  /** The reply is known: its raw response tells when the exchange is over. */
  seen (reply: FastifyReply): void {
    const raw: RawResponse = reply.raw
    if (this.#over || raw[kExchange] !== undefined) return
    raw[kExchange] = this
    if (isGone(raw, this.request)) {
      this.closed(isComplete(raw, this.request))
      return
    }
    raw.on('close', onClose)
    // Nobody detaches a refused upgrade's response from its socket, so its `close` waits for the connection's.
    if (isUpgrade(this.request)) raw.on('finish', () => { this.closed(true) })
    if (hasNoTurnYet(raw)) this.#watchSocket(raw)
  }

  /** The socket's side is done. */
  closed (complete: boolean): void {
    if (this.#over) return
    this.#over = true
    this.#aborted = !complete || this.request[kSettled] === SETTLED_AFTER_ABORT
    this.advance()
  }

  /** Looks whether the exchange has ended by now. */
  advance (): void {
    if (!this.#over || this.outcome !== undefined) return
    const { [kSettled]: settled = UNSETTLED, [kReply]: reply } = this.request
    if (settled !== UNSETTLED || reply?.sent === true) this.#end()
    else this.#followHandler()
  }

  /** Fastify waits for a body that never comes; a handler that runs already reads it by itself. */
  bodyLost (): void {
    if (this.request[kReply] == null) this.force()
  }

  /** Ends an exchange whose handler was never seen to settle. */
  force (): void {
    this.#aborted ||= !this.#over
    this.#over = true
    this.request[kSettled] ||= SETTLED
    this.advance()
  }

  /** A hijacked upgrade is answered on the bare socket. */
  upgrading (raw: RawResponse): void {
    onUpgradeAnswer(raw.socket ?? this.request.raw.socket, status => {
      this.#upgradeStatus = status
      this.closed(true)
    })
  }

  /** What the outcome would be, if it ended now. */
  soFar (): ExchangeOutcome {
    const { [kFailure]: error, [kReply]: reply } = this.request
    const statusCode = this.#upgradeStatus ?? reply?.raw.statusCode ?? 200
    const aborted = this.#aborted
    return error === undefined
      ? { statusCode, failed: false, aborted }
      : { statusCode, failed: true, error: error === THREW_UNDEFINED ? undefined : error, aborted }
  }

  #end (): void {
    this.outcome = this.soFar()
    this.listener.exchangeEnded()
  }

  #followHandler (): void {
    const returned = this.request[kReturned]
    // A rejection reaches `reply.send`. The reply itself is a thenable too, but of the response, not of the handler.
    if (!isThenable(returned) || returned === (this.request[kReply] as unknown)) return
    // So does anything but `undefined`, and may fail there.
    returned.then(value => {
      if (value !== undefined) return
      this.request[kSettled] ||= SETTLED
      this.advance()
    }, () => {})
  }

  #watchSocket (raw: RawResponse): void {
    const socket = this.request.raw.socket
    const lost = (): void => { this.closed(false) }
    socket.once('close', lost)
    raw.once('close', () => { socket.removeListener('close', lost) })
  }
}

/**
 * Watches the exchanges of an app and its children.
 * @param open makes the exchange of a request that has none yet
 */
export function watchExchanges (app: FastifyInstance, open: (request: FastifyRequest) => void): void {
  // Part of every request's hidden class. The others are not: Fastify's loop over what is declared costs more than a write.
  app.decorateRequest(kExchange, null)
  app.decorateRequest(kReply, null)

  app.addHook('onRoute', watchHandler)
  for (const instance of instancesOf(app)) instance.addHook('onError', onError)
  watchReply(app, open)
}

/** `reply.send` and `reply.hijack` of this app and its children, with a look at the exchange on the way. */
function watchReply (app: FastifyInstance, open: (request: FastifyRequest) => void): void {
  let base: FastifyReply | undefined

  function send (this: FastifyReply, payload?: unknown): FastifyReply {
    base ??= baseOf(this, send)
    const request: Watched = this.request
    const isFirst = !this.sent
    request[kExchange]?.seen(this)
    settle(request, this, isFirst && isGone(this.raw, request))
    if (isFirst && payload instanceof Error) fail(request, this, payload)
    else if (request[kFailure] !== undefined) sayWhenToRetry(this, request[kFailure])
    base.send.call(this, payload)
    request[kExchange]?.advance()
    return this
  }

  function hijack (this: FastifyReply): FastifyReply {
    base ??= baseOf(this, send)
    const request: Watched = this.request
    base.hijack.call(this)
    settle(request, this, isGone(this.raw, request))
    if (isUpgrade(request)) {
      if (request[kExchange] == null) open(request)
      request[kExchange]?.upgrading(this.raw)
    }
    request[kExchange]?.seen(this)
    request[kExchange]?.listener.replyHijacked()
    request[kExchange]?.advance()
    return this
  }

  app.decorateReply('send', send)
  app.decorateReply('hijack', hijack)
}

function settle (request: Watched, reply: FastifyReply, afterAbort: boolean): void {
  request[kReply] = reply
  request[kSettled] ||= afterAbort ? SETTLED_AFTER_ABORT : SETTLED
}

/** The prototype behind the one that has this `send`: Fastify's own, or that of a parent app. */
function baseOf (reply: FastifyReply, send: unknown): FastifyReply {
  let prototype: FastifyReply = reply
  do prototype = Object.getPrototypeOf(prototype)
  while (!Object.hasOwn(prototype, 'send') || prototype.send !== send)
  return Object.getPrototypeOf(prototype)
}

function onError (request: FastifyRequest, reply: FastifyReply, error: unknown, done: () => void): void {
  fail(request, reply, error)
  done()
}

/** An error handler may have left out the headers of the error. */
function sayWhenToRetry (reply: FastifyReply, error: unknown): void {
  if (isToBeRetried(error) && reply.statusCode === 503 && !reply.hasHeader('retry-after')) reply.header('retry-after', RETRY_AFTER)
}

function fail (request: Watched, reply: FastifyReply, error: unknown): void {
  if (isGone(reply.raw, request) && isOfAbort(error)) return
  request[kFailure] = error === undefined ? THREW_UNDEFINED : error
}

const watched = new WeakSet<object>()

function watchHandler (route: RouteOptions & { websocket?: boolean, wsHandler?: unknown }): void {
  const handler = route.handler
  // The handlers of @fastify/websocket take other arguments. A HEAD route comes with its GET's handler.
  if (route.websocket === true || route.wsHandler !== undefined || watched.has(handler)) return

  function watchedHandler (this: FastifyInstance, request: Watched, reply: FastifyReply): unknown {
    request[kReply] = reply
    request[kExchange]?.seen(reply)
    const returned = handler.call(this, request, reply)
    if (returned !== undefined) request[kReturned] = returned
    request[kExchange]?.advance()
    return returned
  }

  // Tracers and documentation read the handler's name.
  Object.defineProperty(watchedHandler, 'name', { value: handler.name })
  watched.add(watchedHandler)
  route.handler = watchedHandler
}

/**
 * A body that an abort cuts off before Fastify reads it neither ends nor fails, so that neither the handler nor `reply.send`
 * is ever called (`rawBody` in Fastify's content-type-parser.js): that wait begins with `resume`.
 */
function watchBody (exchange: Exchange): void {
  const raw: RawRequest = exchange.request.raw
  raw[kExchange] = exchange
  raw.on('close', onRequestClose)
}

function onRequestClose (this: RawRequest): void {
  if (this.readableEnded) return
  const { resume } = this
  this.resume = () => {
    this.resume = resume
    this[kExchange]?.bodyLost()
    return this.resume()
  }
}

function onClose (this: RawResponse): void {
  const exchange = this[kExchange]
  exchange?.closed(isComplete(this, exchange.request))
}
