/** What a raw request and response tell of their connection, over HTTP/1.1, HTTP/2, upgrades and `inject()`. */
import type { ServerResponse } from 'node:http'
import type { Http2Stream } from 'node:http2'
import type { Socket } from 'node:net'
import type { FastifyRequest } from 'fastify'

/** A response, with what HTTP/2 and `inject()` add. */
export type RawResponse = ServerResponse & { stream?: Http2Stream, isLightMyRequest?: boolean }

export function isUpgrade (request: FastifyRequest): boolean {
  // The stand-in of `injectWS` has only the headers.
  const { upgrade = request.raw.headers.upgrade !== undefined } = request.raw as { upgrade?: boolean | null }
  return upgrade === true
}

/** A response behind another one of its connection: it gets the socket when it is its turn. */
export function hasNoTurnYet (raw: RawResponse): boolean {
  return raw.stream === undefined && raw.socket === null
}

/** Whether nobody can be reached by this response any more: it is finished, or its connection is lost. */
export function isGone (raw: RawResponse, request: FastifyRequest): boolean {
  if (raw.stream !== undefined) return raw.stream.destroyed
  return raw.destroyed || (raw.socket === null && socketOf(request)?.destroyed === true)
}

/** Whether the last byte of a response that is over was handed to the socket. */
export function isComplete (raw: RawResponse, request: FastifyRequest): boolean {
  if (raw.stream !== undefined) return raw.writableEnded && raw.stream.writableFinished && raw.stream.rstCode === 0
  // `inject()` closes its response before the bytes have left its stand-in for a socket.
  if (raw.isLightMyRequest === true) return raw.writableEnded
  // A response whose connection was lost counts as finished too, with its last bytes still in the socket's buffer.
  const socket = socketOf(request)
  return raw.writableFinished && (socket?.destroyed !== true || socket.writableFinished)
}

/**
 * What `await reply`, or a pipeline into the response, rejects with when the client hangs up, and what becomes of that
 * error once headers were sent: an abort, not a failure.
 */
export function isOfAbort (error: unknown): boolean {
  return error instanceof Error && 'code' in error &&
    (error.code === 'ERR_STREAM_PREMATURE_CLOSE' || error.code === 'ERR_HTTP_HEADERS_SENT')
}

/**
 * The first bytes on the socket of a hijacked upgrade tell whether it was accepted, and `end` whether `ws` itself refused it;
 * another status that is written comes before the connection's `close`.
 */
export function onUpgradeAnswer (socket: Socket, answered: (status: number) => void): void {
  const { write, end } = socket
  const watch = <Method extends typeof write | typeof end>(method: Method, tells: RegExp): Method => {
    // What Node's types cannot say: the arguments and result of whichever overload the caller used.
    return ((...args: unknown[]) => {
      socket.write = write
      socket.end = end
      const result: unknown = Reflect.apply(method, socket, args)
      const status = tells.exec(String(args[0]))?.[1]
      if (status !== undefined) answered(Number(status))
      return result
    }) as Method
  }
  socket.write = watch(write, /^HTTP\/1\.1 (101)/)
  socket.end = watch(end, /^HTTP\/1\.1 (\d{3})/)
}

/** A stand-in for a request (`injectWS`) has none. */
function socketOf (request: FastifyRequest): Socket | undefined {
  return request.raw.socket as Socket | undefined
}
