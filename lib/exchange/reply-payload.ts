/** The payload of a reply: a value, a stream or a response of somebody else. */
import type { FastifyReply } from 'fastify'
import { attempt, promiseOf, readOr } from '../foreign.js'

/** Whether Fastify sends a payload. It refuses others after the last hook (`onSendEnd` in its reply.js). */
export function canBeSent (payload: unknown): boolean {
  if (payload === undefined || payload === null || typeof payload === 'string' || Buffer.isBuffer(payload)) return true
  return readOr(true, () => {
    const { pipe, getReader, locked, body, bodyUsed } = payload as Partial<Record<'pipe' | 'getReader' | 'locked' | 'body' | 'bodyUsed', unknown>>
    if (typeof pipe === 'function') return true
    if (typeof getReader === 'function') return locked !== true
    return Object.prototype.toString.call(payload) === '[object Response]' && (body === null || bodyUsed !== true)
  })
}

/** Headers that other hooks have set for a payload that will not be sent, such as its encoding. They do not fit the error. */
const OF_THE_PAYLOAD = ['content-encoding', 'content-range', 'content-length', 'etag', 'last-modified', 'cache-control', 'expires']

/** Takes back a payload that will not be sent, because the jobs of the request could not be stored. */
export function withdraw (reply: FastifyReply, payload: unknown): void {
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
