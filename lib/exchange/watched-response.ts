/** The events of a raw response, told to its exchanges. */
import type { FastifyRequest } from 'fastify'
import { endsAtFinish, isComplete, type RawResponse as Raw } from './connection.js'
import { isUpgrade } from './upgrade.js'

/** An exchange that is told of its raw response. */
export interface ResponseListener {
  readonly request: FastifyRequest
  /** The listener that was there before. Fastify may have made several requests of one raw response (`app.routing`). */
  before: ResponseListener | undefined
  /** @param complete whether the last byte was handed to the socket */
  closed: (complete: boolean) => void
}

const kListener = Symbol('fastify-background-tasks.response-listener')

type RawResponse = Raw & { [kListener]?: ResponseListener }

export function watchResponse (raw: RawResponse, listener: ResponseListener): void {
  listener.before = raw[kListener]
  raw[kListener] = listener
  if (listener.before !== undefined) return
  raw.on('close', onClose)
  // When a client closes its HTTP/2 stream with NO_ERROR, `close` may never come.
  raw.stream?.on('aborted', () => { onClose.call(raw) })
  // Nobody detaches the response of a refused upgrade from its socket, so its `close` waits for that of the connection.
  if (endsAtFinish(raw) || isUpgrade(listener.request)) raw.on('finish', onFinish)
}

/** One listener for all responses, because a closure for each response costs 9 % of an empty request. */
function onClose (this: RawResponse): void {
  for (let listener = this[kListener]; listener !== undefined; listener = listener.before) {
    listener.closed(isComplete(this, listener.request))
  }
}

function onFinish (this: RawResponse): void {
  for (let listener = this[kListener]; listener !== undefined; listener = listener.before) listener.closed(true)
}
