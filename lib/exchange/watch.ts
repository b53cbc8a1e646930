/**
 * Fastify's hooks, as they tell of an exchange. All are official ones, and callback hooks: a request that uses no tasks pays for a few
 * property writes, and for no promise and no closure.
 */
import type { FastifyInstance, FastifyReply, FastifyRequest, RouteOptions } from 'fastify'
import { isToBeRetried, RETRY_AFTER } from '../errors.js'
import { attempt, isNativePromise, promiseOf, readOr } from '../foreign.js'
import { instancesOf } from '../instances.js'
import { isGone, isOfAbort } from './connection.js'
import { Exchange, kExchange, type ExchangeListener, type ExchangeReply } from './exchange.js'
import { failureOf, hasFailed, isHandled, noteFailure, noteHandled, noteReturned, noteSending, noteSettled } from './replies.js'
import { isUpgrade } from './upgrade.js'

const kReply = Symbol('fastify-background-tasks.reply')
const kEarly = Symbol('fastify-background-tasks.early')
/** In a route's `config`: whether the last of its `onSend` hooks is ours. */
const kHasLastHook = Symbol('fastify-background-tasks.has-last-hook')

interface WatchedRequest extends FastifyRequest {
  [kReply]?: ExchangeReply | null
  /** Opened before our `onRequest` hook has shown the reply. */
  [kEarly]?: Exchange
}

/** Of requests that somebody had frozen before we saw them. */
interface Kept {
  reply?: ExchangeReply
  early?: Exchange
}
const frozen = new WeakMap<FastifyRequest, Kept>()

/** The exchange of a request, if it has one. */
export function exchangeOf (request: WatchedRequest): Exchange | null | undefined {
  const { [kReply]: reply } = request
  if (reply != null) return reply[kExchange]
  const kept = frozen.get(request)
  return kept?.reply?.[kExchange] ?? request[kEarly] ?? kept?.early
}

/** Opens the exchange of a request that has none. One that is over by now may end right away. */
export function openExchange (request: WatchedRequest, listener: ExchangeListener): Exchange {
  const exchange = new Exchange(request, listener, hasLastHook)
  listener.exchangeOpened(exchange)
  const reply = request[kReply] ?? frozen.get(request)?.reply
  if (reply != null) {
    watchReply(exchange, reply)
    return exchange
  }
  const { raw } = request
  raw.once?.('close', () => { exchange.requestClosed() })
  try {
    request[kEarly] = exchange
  } catch {
    frozen.set(request, { ...frozen.get(request), early: exchange })
  }
  return exchange
}

/**
 * Watches the exchanges of an app and its children.
 * @param open makes the exchange of a request that has none yet
 */
export function watchExchanges (app: FastifyInstance, open: (request: FastifyRequest) => void): void {
  // Part of the hidden class of every request and reply. Further ones are not declared: Fastify's loop over them costs more than a write.
  app.decorateRequest(kReply, null)
  app.decorateReply(kExchange, null)

  app.addHook('onRoute', backgroundTasksOnRoute)
  for (const instance of instancesOf(app)) {
    instance.addHook('onRequest', function backgroundTasksOnRequest (request, reply, done) {
      attachReply(request, reply)
      if (isUpgrade(request)) {
        // Whoever upgrades the connection adds tasks later, when nothing tells any more that it was.
        open(request)
        exchangeOf(request)?.watchUpgrade()
      }
      done()
    })
    instance.addHook('onSend', backgroundTasksOnSend)
    instance.addHook('onError', backgroundTasksOnError)
  }
}

/** The first hook that is given the reply may be any of them: a hook before ours can reply itself. */
function attachReply (request: WatchedRequest, reply: ExchangeReply): void {
  if (request[kReply] === reply) return
  try {
    request[kReply] = reply
  } catch {
    frozen.set(request, { ...frozen.get(request), reply })
  }
  const early = request[kEarly] ?? frozen.get(request)?.early
  if (early !== undefined) watchReply(early, reply)
}

/** `hijack` is watched on this one reply: it refines the moment, and a miss costs only time. */
function watchReply (exchange: Exchange, reply: ExchangeReply): void {
  exchange.hijack = reply.hijack
  try {
    reply.hijack = hijackWatched
  } catch {}
  exchange.attachReply(reply)
}

function hijackWatched (this: ExchangeReply): FastifyReply {
  const exchange = this[kExchange]
  exchange?.hijack?.call(this)
  exchange?.hijacked()
  return this
}

function hasLastHook (request: FastifyRequest, reply: ExchangeReply): boolean {
  return isHandled(reply) || (request.routeOptions.config as { [kHasLastHook]?: boolean } | undefined)?.[kHasLastHook] === true
}

type Done = (error?: Error) => void

/** Comes before the app's and the route's own hooks that were added later; on most routes {@link backgroundTasksLastOnSend} comes after them all. */
function backgroundTasksOnSend (request: FastifyRequest, reply: ExchangeReply, payload: unknown, done: Done): void {
  attachReply(request, reply)
  const exchange = reply[kExchange]
  if (exchange == null) {
    noteSending(reply)
    done()
    return
  }
  exchange.sending(reply)
  if (hasLastHook(request, reply)) done()
  else lastOfAll(exchange, reply, payload, done)
}

function backgroundTasksLastOnSend (_request: FastifyRequest, reply: ExchangeReply, payload: unknown, done: Done): void {
  const exchange = reply[kExchange]
  if (exchange != null) {
    lastOfAll(exchange, reply, payload, done)
    return
  }
  noteSettled(reply)
  done()
}

/** What the reply promises is stored when no other hook can fail any more. */
function lastOfAll (exchange: Exchange, reply: ExchangeReply, payload: unknown, done: Done): void {
  // Fastify is about to refuse it, and its error comes this way again.
  if (!canBeSent(payload)) {
    done()
    return
  }
  const { handling } = exchange
  // An `onError` hook of another plugin, before ours, that failed itself.
  const isUnsure = handling !== undefined && reply.statusCode >= 400 && !hasFailed(reply)
  const wait = isUnsure
    ? Promise.race([handling, undefined])
      .then(undefined, error => {
        failed(reply, error)
        exchange.sending(reply)
      })
      .then(() => exchange.listener.storeBeforeReply())
    : exchange.listener.storeBeforeReply()
  if (wait === undefined) {
    goOut(exchange, reply)
    done()
    return
  }
  wait
    .then(() => {
      goOut(exchange, reply)
      try {
        done()
      } catch (error) {
        // What Fastify then sends may be refused. It guards that itself in a synchronous hook, and after a promise since 5.11 only.
        done(error as Error)
      }
    }, error => {
      withdraw(reply, payload)
      done(error as Error)
    })
    .catch(err => { attempt(() => { reply.log.error({ err }, 'the reply could not be sent') }) })
}

function goOut (exchange: Exchange, reply: ExchangeReply): void {
  if (hasFailed(reply)) sayWhenToRetry(reply, failureOf(reply))
  noteSettled(reply)
  exchange.settle()
}

/** Whether Fastify sends a payload. It refuses others after the last hook (`onSendEnd` in its reply.js). */
function canBeSent (payload: unknown): boolean {
  if (payload === undefined || payload === null || typeof payload === 'string' || Buffer.isBuffer(payload)) return true
  return readOr(true, () => {
    const { pipe, getReader, locked, body, bodyUsed } = payload as Partial<Record<'pipe' | 'getReader' | 'locked' | 'body' | 'bodyUsed', unknown>>
    if (typeof pipe === 'function') return true
    if (typeof getReader === 'function') return locked !== true
    return Object.prototype.toString.call(payload) === '[object Response]' && (body === null || bodyUsed !== true)
  })
}

/** What other hooks have said of a payload that will not be sent, such as its encoding, is not true of the error. */
const OF_THE_PAYLOAD = ['content-encoding', 'content-range', 'content-length', 'etag', 'last-modified', 'cache-control', 'expires']

function withdraw (reply: FastifyReply, payload: unknown): void {
  for (const header of OF_THE_PAYLOAD) attempt(() => { reply.removeHeader(header) })
  const stream = payload as { on?: unknown, destroy?: unknown, cancel?: unknown } | null | undefined
  attempt(() => {
    if (typeof stream?.on === 'function' && typeof stream.destroy === 'function') {
      stream.on('error', () => {})
      stream.destroy()
    } else if (typeof stream?.cancel === 'function') {
      promiseOf(stream.cancel())?.catch(() => {})
    }
  })
}

/** An error handler may have left out the headers of the error. */
function sayWhenToRetry (reply: FastifyReply, error: unknown): void {
  if (isToBeRetried(error) && reply.statusCode === 503 && !reply.hasHeader('retry-after')) reply.header('retry-after', RETRY_AFTER)
}

function backgroundTasksOnError (request: FastifyRequest, reply: ExchangeReply, error: unknown, done: () => void): void {
  attachReply(request, reply)
  failed(reply, error)
  done()
}

function failed (reply: ExchangeReply, error: unknown): void {
  if (isGone(reply.raw, reply.request) && isOfAbort(error)) return
  const exchange = reply[kExchange]
  if (exchange != null) exchange.fail(reply, error)
  else noteFailure(reply, error)
}

type Handler = (this: FastifyInstance, request: FastifyRequest, reply: FastifyReply) => unknown
const watched = new WeakSet<Handler>()

function backgroundTasksOnRoute (this: FastifyInstance, route: RouteOptions & { websocket?: boolean, wsHandler?: unknown }): void {
  route.config = { ...route.config, [kHasLastHook]: true } as object
  const putLast = (): void => { route.onSend = [...[route.onSend ?? []].flat().filter(hook => hook !== backgroundTasksLastOnSend), backgroundTasksLastOnSend] as never }
  putLast()
  // Behind the hooks that `onRoute` hooks of other plugins add, too: Fastify reads them when all plugins are loaded.
  this.after(putLast)
  // The handlers of @fastify/websocket take other arguments. A HEAD route comes with its GET's handler.
  if (route.websocket === true || route.wsHandler !== undefined || watched.has(route.handler as Handler)) return
  route.handler = watchHandler(route.handler as Handler)
}

/** What belongs to the function itself. */
const OF_ANY_FUNCTION: ReadonlySet<PropertyKey> = new Set(['prototype', 'arguments', 'caller'])

/** The handler, with a look at what it returns: after an abort nothing else may tell that it has ended. */
function watchHandler (handler: Handler): Handler {
  function watchedHandler (this: FastifyInstance, request: FastifyRequest, reply: ExchangeReply): unknown {
    let returned: unknown
    noteHandled(reply)
    try {
      returned = handler.call(this, request, reply)
    } catch (error) {
      failed(reply, error)
      throw error
    }
    const exchange = reply[kExchange]
    if (exchange == null) {
      noteReturned(reply, returned)
      return returned
    }
    // A thenable may be lazy: Fastify is given a promise, so that nobody calls its `then` twice.
    const adopted = returned === undefined || returned === reply || isNativePromise(returned) ? returned : promiseOf(returned) ?? returned
    exchange.returned(reply, adopted)
    return adopted
  }

  // Guards read what was put on a handler, tracers and documentation its name.
  for (const key of Reflect.ownKeys(handler)) {
    const property = Object.getOwnPropertyDescriptor(handler, key)
    if (property !== undefined && !OF_ANY_FUNCTION.has(key)) attempt(() => { Object.defineProperty(watchedHandler, key, property) })
  }
  watched.add(watchedHandler)
  return watchedHandler
}
