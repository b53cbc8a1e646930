import type { FastifyRequest } from 'fastify'

/** An exchange that waits for its handler. */
interface BodyWaiter {
  readonly request: FastifyRequest
  /** Undefined until the exchange has ended. */
  readonly outcome: object | undefined
  /** The body will never come. */
  bodyLost: () => void
}

/**
 * Tells an exchange of a body that will never come. A body that an abort cuts off before Fastify reads it neither ends nor fails, so that
 * neither the handler nor `onSend` is ever called (`rawBody` in Fastify's content-type-parser.js). Fastify begins to wait for a body with
 * `resume`, so that call is watched.
 */
export function watchBody (exchange: BodyWaiter): void {
  const { raw } = exchange.request
  let isWatched = false
  const watchResume = (): void => {
    if (isWatched || raw.readableEnded || exchange.outcome !== undefined) return
    isWatched = true
    const { resume } = raw
    raw.resume = () => {
      raw.resume = resume
      exchange.bodyLost()
      return raw.resume()
    }
  }
  if (raw.closed) {
    watchResume()
    return
  }
  // Node itself resumes an HTTP/2 request whose response closes first, so the watch begins after that. A request that is closing now emits
  // no second `close`. A stand-in for a request has no events.
  raw.once?.('close', watchResume)
  setImmediate(watchResume)
}
