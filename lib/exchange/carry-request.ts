/** Keeps code that runs for a request part of that request, where Node or Fastify calls it from elsewhere (`ambient: true`). */
import { EventEmitter } from 'node:events'
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

/**
 * A connection, which serves one request after another. It keeps the last one, as it does anyway: Node sets the timer of an idle connection
 * when a response ends, and the timer is part of its request.
 */
type Connection = EventEmitter & { [kServed]?: { request: FastifyRequest, readonly emit: EventEmitter['emit'] } }

/**
 * Makes the listeners of a raw request and its response part of the request: those of its body, of the end of the response and of an abort,
 * from which Fastify runs the hooks that follow. An upgraded connection belongs to its request until it closes.
 */
export function carryRequest (request: FastifyRequest, reply: FastifyReply): void {
  carry(request.raw as EventEmitter, request)
  carry(reply.raw as EventEmitter, request)
  const { socket } = request.raw as { socket?: EventEmitter }
  // The stream of an HTTP/2 request is not its connection, and has no such timeout.
  if (socket !== undefined && request.raw.httpVersionMajor === 1) carryTimeout(socket, request)
  // The stand-in for a request that `injectWS` makes has no socket.
  if (isUpgrade(request)) carry(socket ?? reply.raw.socket as EventEmitter | undefined, request)
}

/**
 * Makes the timeout of a connection part of the last request that came on it, as Fastify does for its `onTimeout` hooks. A hook of our own
 * would do it, too, but Fastify then needs a socket in each raw request.
 */
function carryTimeout (connection: Connection, request: FastifyRequest): void {
  attempt(() => {
    const { emit, [kServed]: served } = connection
    if (served !== undefined) {
      served.request = request
      return
    }
    if (typeof emit !== 'function') return
    connection[kServed] = { request, emit }
    connection.emit = emitTimeout
  })
}

function emitTimeout (this: Connection, ...args: EmitArguments): boolean {
  const { [kServed]: served } = this
  if (served === undefined) return emitOfCopy(this, args)
  const { request, emit } = served
  return args[0] === 'timeout' ? asPartOf(request, apply, emit, this, args) : emit.apply(this, args)
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
  const args = arguments as unknown as EmitArguments
  const { [kCarried]: carried } = this
  if (carried === undefined) return emitOfCopy(this, args)
  const { request, emit } = carried
  // Most events have no listener, and entering the request costs more than the call.
  if (this.listenerCount(event) === 0 || isPartOf(request)) return emit.apply(this, args)
  return asPartOf(request, apply, emit, this, args)
}

/** The `emit` of a raw request was copied to something else, or is called on it. */
function emitOfCopy (emitter: EventEmitter, args: EmitArguments): boolean {
  return EventEmitter.prototype.emit.apply(emitter, args)
}

function apply (emit: EventEmitter['emit'], emitter: Emitter, args: EmitArguments): boolean {
  return emit.apply(emitter, args)
}

/**
 * Makes what follows a hook part of its request: the hooks of its kind, or the parser, the validator, the handler, the serializer or the error
 * handler. Fastify may come from a timer, or from the callback of a connection that another request has opened: such code calls the `done` of
 * a hook, and replies.
 */
export function backgroundTasksEnter (request: FastifyRequest, _reply: FastifyReply, done: () => void): void {
  if (isPartOf(request)) done()
  else asPartOf(request, done)
}

export function backgroundTasksEnterWith (request: FastifyRequest, reply: FastifyReply, _value: unknown, done: () => void): void {
  backgroundTasksEnter(request, reply, done)
}

/** The hooks of the kinds that have none of ours otherwise. */
export const ENTERING = [
  ['preParsing', backgroundTasksEnterWith], ['preValidation', backgroundTasksEnter], ['preHandler', backgroundTasksEnter], ['preSerialization', backgroundTasksEnterWith]
] as const

/** Makes a hook, and the hooks after it, part of their request. */
export function partOf<Value, Done> (hook: (request: FastifyRequest, reply: FastifyReply, value: Value, done: Done) => void): typeof hook {
  const entering: typeof hook = (request, reply, value, done) => {
    if (isPartOf(request)) hook(request, reply, value, done)
    else asPartOf(request, hook, request, reply, value, done)
  }
  // Tracers read it.
  return Object.defineProperty(entering, 'name', { value: hook.name })
}
