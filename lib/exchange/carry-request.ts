/** Keeps code that runs for a request part of that request, where Node calls it from elsewhere (`ambient: true`). */
import type { EventEmitter } from 'node:events'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { asPartOf } from '../current-request.js'
import { attempt } from '../foreign.js'
import { isUpgrade } from './upgrade.js'

const kCarried = Symbol('fastify-background-tasks.carried')

interface Carried {
  readonly request: FastifyRequest
  readonly emit: EventEmitter['emit']
}

type Emitter = EventEmitter & { [kCarried]?: Carried }

/**
 * Makes the listeners of a raw request and its response part of the request: those of its body, of the end of the response and of an abort,
 * from which Fastify runs the hooks that follow. An upgraded connection belongs to its request until it closes.
 */
export function carryRequest (request: FastifyRequest, reply: FastifyReply): void {
  carry(request.raw as EventEmitter, request)
  carry(reply.raw as EventEmitter, request)
  if (isUpgrade(request)) carry(request.raw.socket as EventEmitter | undefined, request)
}

/** Gives one emitter an `emit` of its own, which calls the one that it had. An emitter that is frozen is left as it is. */
function carry (emitter: Emitter | undefined, request: FastifyRequest): void {
  if (emitter === undefined) return
  attempt(() => {
    const { emit } = emitter
    const carried = emitter[kCarried]
    // Fastify may make several requests of one raw request (`app.routing`): the last one counts.
    emitter[kCarried] = { request, emit: carried?.emit ?? emit }
    if (carried === undefined) emitter.emit = emitCarried
  })
}

function emitCarried (this: Emitter, ...args: Parameters<EventEmitter['emit']>): boolean {
  // It is set together with this function.
  const { request, emit } = this[kCarried] as Carried
  // Most events have no listener, and entering the request costs more than the call.
  if (this.listenerCount(args[0]) === 0) return emit.apply(this, args)
  return asPartOf(request, apply, emit, this, args)
}

function apply (emit: EventEmitter['emit'], emitter: Emitter, args: Parameters<EventEmitter['emit']>): boolean {
  return emit.apply(emitter, args)
}
