// @ts-check
/** What a job of the plugin promises, written by hand: its payload is checked on both sides, it has an id and headers, and its store a deadline. */
import { randomUUID } from 'node:crypto'
import { Type } from '@sinclair/typebox'
import { TypeCompiler } from '@sinclair/typebox/compiler'

/** `BENCH_PAYLOAD`: characters of the text. */
export const PAYLOAD = { to: 'ada@example.com', subject: 'Your order', text: 'x'.repeat(Number(process.env.BENCH_PAYLOAD ?? 150)) }
/** `BENCH_TASKS`: names of the definitions, of which jobs are added in turn. Only the plugin has several. */
export const NAMES = (process.env.BENCH_TASKS ?? 'bench').split(',')
export const SCHEMA = Type.Object({ to: Type.String(), subject: Type.String(), text: Type.String() })
export const CONCURRENCY = 50
export const { REDIS_URL = 'redis://127.0.0.1:6379', POSTGRES_URL = 'postgres://postgres@127.0.0.1:5432/test', RABBITMQ_URL = 'amqp://guest:guest@127.0.0.1:5672' } = process.env

const DEADLINE_MS = 10_000
const schema = TypeCompiler.Compile(SCHEMA)

/** @param {unknown} payload */
export function checked (payload) {
  if (!schema.Check(payload)) throw new TypeError('the payload is invalid')
  return payload
}

/**
 * What is stored of one task.
 * @param {import('fastify').FastifyRequest | undefined} request
 * @param {unknown} [payload]
 */
export function stored (request, payload = PAYLOAD) {
  const { traceparent, tracestate, baggage } = request?.headers ?? {}
  return { id: randomUUID(), data: { payload: checked(payload), headers: { traceparent, tracestate, baggage }, requestId: request?.id, enqueuedAt: Date.now() } }
}

/**
 * @template T
 * @param {Promise<T>} promise
 * @returns {Promise<T>}
 */
export function inTime (promise) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(() => { reject(new Error('it was not stored in time')) }, DEADLINE_MS)
    promise.then(value => { clearTimeout(timer); resolve(value) }, error => { clearTimeout(timer); reject(error) })
  })
}

/**
 * Stores many at once.
 * @param {number} n
 * @param {(count: number) => Promise<unknown>} store stores so many
 */
export async function inGroups (n, store) {
  for (let i = 0; i < n; i += 500) await store(Math.min(500, n - i))
}
