/**
 * Pipelined responses that wait for their turn. Such a response emits no `close` when its connection is lost, so the `close` of the socket
 * tells. Each socket has one listener, however many responses wait.
 */
import type { Socket } from 'node:net'

/** What waits: an exchange. */
interface Waiting {
  closed: (complete: boolean) => void
}

const kWaiting = Symbol('fastify-background-tasks.waiting')

type WatchedSocket = Socket & { [kWaiting]?: Set<Waiting> | undefined }

export function joinSocket (socket: WatchedSocket | undefined, waiting: Waiting): void {
  // A stand-in for a request may have no socket.
  if (socket == null) return
  if (socket[kWaiting] === undefined) {
    socket[kWaiting] = new Set()
    socket.on?.('close', onSocketClose)
  }
  socket[kWaiting].add(waiting)
}

export function leaveSocket (socket: WatchedSocket | undefined, waiting: Waiting): void {
  if (socket?.[kWaiting]?.delete(waiting) !== true || socket[kWaiting].size > 0) return
  socket.removeListener('close', onSocketClose)
  socket[kWaiting] = undefined
}

function onSocketClose (this: WatchedSocket): void {
  for (const waiting of new Set(this[kWaiting])) waiting.closed(false)
}
