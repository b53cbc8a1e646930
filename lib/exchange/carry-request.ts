/** Keeps code that runs for a request part of that request, where Node calls it from elsewhere (`ambient: true`). */
import type { EventEmitter } from 'node:events'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { asPartOf, isPartOf } from '../current-request.js'
import { attempt } from '../foreign.js'
import { isUpgrade } from './upgrade.js'

const kCarried = Symbol('fastify-background-tasks.carried')
const kServed = Symbol('fastify-background-tasks.served')

interface Carried {
  readonly request: FastifyRequest
  readonly emit: EventEmitter['emit']
}

type EmitArguments = Parameters<EventEmitter['emit']>

type Emitter = EventEmitter & { [kCarried]?: Carried }

/** A connection, which serves several requests. It does not keep those that have ended. */
type Connection = EventEmitter & { [kServed]?: { request: WeakRef<FastifyRequest>, readonly emit: EventEmitter['emit'] } }

/**
 * Makes the listeners of a raw request and its response part of the request: those of its body, of the end of the response and of an abort,
 * from which Fastify runs the hooks that follow. An upgraded connection belongs to its request until it closes.
 */
export function carryRequest (request: FastifyRequest, reply: FastifyReply): void {
  carry(request.raw as EventEmitter, request)
  carry(reply.raw as EventEmitter, request)
  const { socket } = request.raw as { socket?: EventEmitter }
  // The stand-in for a request that `injectWS` makes has no socket.
  if (isUpgrade(request)) carry(socket ?? reply.raw.socket as EventEmitter | undefined, request)
  // The stream of an HTTP/2 request is not its connection, and has no such timeout.
  else if (socket !== undefined && request.raw.httpVersionMajor === 1) carryTimeout(socket, request)
}

/**
 * Makes the timeout of a connection part of the last request that came on it, as Fastify does for its `onTimeout` hooks. A hook of our own
 * would do it, too, but Fastify then needs a socket in each raw request, and the connection keeps the request.
 */
function carryTimeout (connection: Connection, request: FastifyRequest): void {
  attempt(() => {
    const { emit, [kServed]: served } = connection
    if (served !== undefined) {
      served.request = new WeakRef(request)
      return
    }
    if (typeof emit !== 'function') return
    connection[kServed] = { request: new WeakRef(request), emit }
    connection.emit = emitTimeout
  })
}

function emitTimeout (this: Connection, ...args: EmitArguments): boolean {
  // It is set together with this function.
  const { request, emit } = this[kServed] as NonNullable<Connection[typeof kServed]>
  const served = args[0] === 'timeout' ? request.deref() : undefined
  return served === undefined ? emit.apply(this, args) : asPartOf(served, apply, emit, this, args)
}

/**
 * Gives one emitter an `emit` of its own, which calls the one that it had. An emitter that is frozen is left as it is, and so is an object
 * that emits nothing: the stand-in for a request that `injectWS` makes.
 */
function carry (emitter: Emitter | undefined, request: FastifyRequest): void {
  // No `attempt`: it would cost each request a closure.
  try {
    if (typeof emitter?.emit !== 'function') return
    const { emit, [kCarried]: carried } = emitter
    // Fastify may make several requests of one raw request (`app.routing`): the last one counts.
    emitter[kCarried] = { request, emit: carried?.emit ?? emit }
    if (carried === undefined) emitter.emit = emitCarried
  } catch {}
}

function emitCarried (this: Emitter, event: string | symbol): boolean {
  // It is set together with this function.
  const { request, emit } = this[kCarried] as Carried
  const args = arguments as unknown as EmitArguments
  // Most events have no listener, and entering the request costs more than the call.
  if (this.listenerCount(event) === 0 || isPartOf(request)) return emit.apply(this, args)
  return asPartOf(request, apply, emit, this, args)
}

function apply (emit: EventEmitter['emit'], emitter: Emitter, args: EmitArguments): boolean {
  return emit.apply(emitter, args)
}
