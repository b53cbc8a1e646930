/**
 * The hooks of Fastify that tell of an exchange. All of them are official and callback hooks, so a request that uses no tasks pays for a
 * few property writes, and for no promise and no closure.
 */
import type { FastifyInstance, FastifyReply, FastifyRequest, RouteOptions } from 'fastify'
import { isToBeRetried, RETRY_AFTER } from '../errors.js'
import { attempt, isNativePromise, promiseOf } from '../foreign.js'
import { instancesOf } from '../instances.js'
import { backgroundTasksEnter, backgroundTasksEnterWith, carryRequest, ENTERING, partOf } from './carry-request.js'
import { isGone, isOfAbort } from './connection.js'
import { Exchange, kExchange, type ExchangeListener, type ExchangeReply } from './exchange.js'
import { failureOf, hasFailed, isHandled, noteFailure, noteHandled, noteReturned, noteSending, noteSettled } from './replies.js'
import { canBeSent, withdraw } from './reply-payload.js'
import { isUpgrade } from './upgrade.js'

const kReply = Symbol('fastify-background-tasks.reply')
const kEarly = Symbol('fastify-background-tasks.early')
/** The property of a route's `config` that tells whether the last of its `onSend` hooks is ours. */
const kHasLastHook = Symbol('fastify-background-tasks.has-last-hook')

interface WatchedRequest extends FastifyRequest {
  [kReply]?: ExchangeReply | null
  /** The exchange, if it was opened before our `onRequest` hook has shown the reply. */
  [kEarly]?: Exchange
}

/** What is noted of a request that somebody had frozen before we saw it. */
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

/** Opens the exchange of a request that has none. An exchange that is over already may end immediately. */
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
 * @param isAmbient whether all that runs for a request has to be part of it, see {@link carryRequest}
 */
export function watchExchanges (app: FastifyInstance, open: (request: FastifyRequest) => void, isAmbient: boolean): void {
  // These two become part of the hidden class of every request and reply. Other properties are not declared, because Fastify's loop over
  // them costs more than a write.
  app.decorateRequest(kReply, null)
  app.decorateReply(kExchange, null)

  app.addHook('onRoute', onRoute(isAmbient))
  for (const instance of instancesOf(app)) {
    instance.addHook('onRequest', function backgroundTasksOnRequest (request, reply, done) {
      attachReply(request, reply)
      if (isUpgrade(request)) {
        // Whoever upgrades the connection adds tasks later, when nothing tells any more that there was an upgrade.
        open(request)
        exchangeOf(request)?.watchUpgrade()
      }
      if (!isAmbient) {
        done()
        return
      }
      carryRequest(request, reply)
      backgroundTasksEnter(request, reply, done as () => void)
    })
    instance.addHook('onSend', isAmbient ? partOf(backgroundTasksOnSend) : backgroundTasksOnSend)
    instance.addHook('onError', isAmbient ? partOf(backgroundTasksOnError) : backgroundTasksOnError)
    if (isAmbient) for (const [name, hook] of ENTERING) instance.addHook(name as 'preHandler', hook as typeof backgroundTasksEnter)
  }
}

/** Attaches the reply to its request. Any of our hooks may be the first that is given the reply, because a hook before ours can reply itself. */
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

/**
 * Gives an exchange its reply, and wraps the `hijack` of this one reply. Where that is not possible, the exchange ends later, and no task
 * is lost.
 */
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

/**
 * Whether a reply's route has the last hook. Not-found handlers, and routes declared before this plugin, have not: their own hooks that come
 * after ours are not seen.
 */
function hasLastHook (request: FastifyRequest, reply: ExchangeReply): boolean {
  return isHandled(reply) || (request.routeOptions.config as { [kHasLastHook]?: boolean } | undefined)?.[kHasLastHook] === true
}

type Done = (error?: Error) => void

/**
 * This hook comes before the app's and the route's own hooks that were added later. On most routes {@link backgroundTasksLastOnSend} comes
 * after them all.
 */
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

/** Stores what the reply promises when no other hook can fail any more, and lets the reply go out. */
function lastOfAll (exchange: Exchange, reply: ExchangeReply, payload: unknown, done: Done): void {
  // Fastify is about to refuse it, and its error comes this way again.
  if (!canBeSent(payload)) {
    done()
    return
  }
  const { handling } = exchange
  // The `onError` hook of another plugin, before ours, may have failed itself, so that ours was not called.
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
        // Fastify may throw while it sends the reply. Fastify catches that itself in a synchronous hook, and after a promise only since
        // 5.11.
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

/** Sets `Retry-After`, which an error handler may have left out. */
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

const LAST = [['onSend', backgroundTasksLastOnSend]] as const
/** A hook of somebody else may have left the request, so the last of its kind enters it again. */
const LAST_OF_AMBIENT = [...LAST, ...ENTERING, ['onError', backgroundTasksEnterWith]] as const

function onRoute (isAmbient: boolean) {
  const last = isAmbient ? LAST_OF_AMBIENT : LAST
  return function backgroundTasksOnRoute (this: FastifyInstance, route: RouteOptions & { websocket?: boolean, wsHandler?: unknown }): void {
    route.config = { ...route.config, [kHasLastHook]: true } as object
    const putLast = (): void => {
      for (const [name, hook] of last) route[name] = [...[route[name] ?? []].flat().filter(other => other !== hook), hook] as never
    }
    putLast()
    // Our hooks also have to come after the hooks that `onRoute` hooks of other plugins add. Fastify reads them when all plugins are loaded.
    this.after(putLast)
    // The handlers of @fastify/websocket take other arguments. A HEAD route has the handler of its GET route, which is watched already.
    if (route.websocket === true || route.wsHandler !== undefined || watched.has(route.handler as Handler)) return
    route.handler = watchHandler(route.handler as Handler)
  }
}

/** Properties that each function has of its own, and that are not copied. */
const OF_ANY_FUNCTION: ReadonlySet<PropertyKey> = new Set(['prototype', 'arguments', 'caller'])

/** Wraps a handler, to see what it returns: after an abort nothing else may tell that the handler has ended. */
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
    // A thenable may be lazy, so Fastify is given a promise, and nobody calls `then` twice.
    const adopted = returned === undefined || returned === reply || isNativePromise(returned) ? returned : promiseOf(returned) ?? returned
    exchange.returned(reply, adopted)
    return adopted
  }

  // Guards read properties that were put on a handler, and tracers and documentation read its name.
  for (const key of Reflect.ownKeys(handler)) {
    const property = Object.getOwnPropertyDescriptor(handler, key)
    if (property !== undefined && !OF_ANY_FUNCTION.has(key)) attempt(() => { Object.defineProperty(watchedHandler, key, property) })
  }
  watched.add(watchedHandler)
  return watchedHandler
}
