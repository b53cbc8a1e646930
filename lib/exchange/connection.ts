/** What a raw request and response tell about their connection, over HTTP/1.1, HTTP/2, upgrades, `inject()` and serverless adapters. */
import { OutgoingMessage, type ServerResponse } from 'node:http'
import type { Http2Stream, ServerHttp2Stream } from 'node:http2'
import { Socket } from 'node:net'
import type { FastifyRequest } from 'fastify'

/** A response, with what HTTP/2 and `inject()` add. */
export type RawResponse = ServerResponse & { stream?: Http2Stream & Partial<ServerHttp2Stream>, isLightMyRequest?: boolean }

/** Whether a response is queued after another one of its connection. The response gets the socket when its turn comes. */
export function hasNoTurnYet (raw: RawResponse): boolean {
  return raw.stream === undefined && raw.socket === null
}

/** Whether a response can reach nobody any more, because it is finished or its connection is lost. */
export function isGone (raw: RawResponse, request: FastifyRequest): boolean {
  if (raw.stream !== undefined) return raw.stream.destroyed || raw.stream.closed
  return raw.destroyed || (raw.socket ?? socketOf(request))?.destroyed === true
}

/** Whether the last byte of a response that is over was handed to the socket. */
export function isComplete (raw: RawResponse, request: FastifyRequest): boolean {
  if (raw.stream !== undefined) {
    // Node ends a stream that its client has closed without an error code, and the stream counts as finished then.
    const { writableFinished, rstCode, aborted } = raw.stream
    return writableFinished && rstCode === 0 && !aborted
  }
  // `inject()` closes its response before the bytes have left its stand-in for a socket.
  if (raw.isLightMyRequest === true) return raw.writableEnded
  // A response whose connection was lost counts as finished too, with its last bytes still in the socket's buffer.
  const socket = socketOf(request)
  if (!raw.writableFinished) return false
  // A server that closes destroys the connections that seem idle to it, after all of their bytes were handed over.
  return socket?.destroyed !== true || socket.writableFinished || (socket.writableLength === 0 && socket.errored == null)
}

/** The status that was sent, or would be sent. A hijacked HTTP/2 reply may be answered on its stream. */
export function statusOf (raw: RawResponse): number {
  const sent = raw.stream?.sentHeaders?.[':status']
  return raw.statusCode === 200 && typeof sent === 'number' ? sent : raw.statusCode
}

// Node has had this getter since 0.9.
const headersSent = Reflect.getOwnPropertyDescriptor(OutgoingMessage.prototype, 'headersSent')?.get as () => boolean

/**
 * Whether somebody has sent headers. When a client has closed its HTTP/2 stream, Node itself sends headers, which are only the status and
 * the date.
 */
export function hasHeaders (raw: RawResponse): boolean {
  const { stream } = raw
  // Node's own getter is called, because @fastify/express puts a `headersSent` of its own on the response.
  return stream === undefined ? headersSent.call(raw) : Object.keys(stream.sentHeaders ?? {}).some(name => name !== ':status' && name !== 'date')
}

/**
 * Whether the response will emit `finish` and possibly no `close`, because a serverless adapter has put a stand-in in the place of its
 * socket.
 */
export function endsAtFinish (raw: RawResponse): boolean {
  return raw.stream === undefined && raw.isLightMyRequest !== true && raw.socket !== null && !(raw.socket instanceof Socket)
}

/**
 * Whether an error tells only that the client has disconnected, which is no failure. `await reply`, or a pipeline into the response,
 * rejects with the first code then. The second code is what becomes of that error when headers were sent already.
 */
export function isOfAbort (error: unknown): boolean {
  try {
    return error instanceof Error && 'code' in error &&
      (error.code === 'ERR_STREAM_PREMATURE_CLOSE' || error.code === 'ERR_HTTP_HEADERS_SENT')
  } catch {
    // An error whose getters throw.
    return false
  }
}

/** The socket of a request. A stand-in for a request (`injectWS`) has none. */
export function socketOf (request: FastifyRequest): Socket | undefined {
  return request.raw.socket as Socket | undefined
}
