/** The connections to Redis: how they are opened, watched and closed, and what their errors may tell. */
import { Redis, type RedisOptions } from 'ioredis'
import { within } from '../../limits.js'
import { messageOf, plainError } from '../plain-error.js'

/** Milliseconds for one attempt to connect, unless the options say otherwise. */
const CONNECT_MS = 2000
/** Milliseconds for a connection to close by itself. */
export const GOODBYE_MS = 500
/** Milliseconds without a reply after which a connection counts as lost. */
export const SILENCE_MS = 5000

/** @param own options that matter more than those of the user */
export function connect (connection: string | RedisOptions, own: RedisOptions): Redis {
  // BullMQ reads replies in the shape that they had up to Redis 6.
  const fixed = { ...own, retryStrategy, disconnectTimeout: GOODBYE_MS, replyMapping: 'legacy' } as const
  if (typeof connection === 'string') return new Redis(connection, { connectTimeout: CONNECT_MS, ...fixed })
  return new Redis({ connectTimeout: CONNECT_MS, ...connection, ...fixed })
}

/**
 * Replaces a connection whose server does not answer. The option of ioredis for this, `socketTimeout`, would take 4 % of the rate at which
 * jobs run. BullMQ looks after the connections that wait for jobs by itself.
 */
export async function reconnectIfSilent (redis: Redis): Promise<void> {
  if (redis.status === 'ready') await answered(SILENCE_MS, redis.ping()).catch(() => { redis.disconnect(true) })
}

/** Closes a connection in whatever state it is. Never rejects. */
export async function close (redis: Redis | undefined): Promise<void> {
  if (redis?.status === 'ready') await answered(GOODBYE_MS, redis.quit()).catch(() => {})
  redis?.disconnect()
}

/** Settles as the promise does, or rejects when the time is over. */
export async function answered<T> (milliseconds: number, promise: Promise<T>): Promise<T> {
  return await within(milliseconds, promise, () => { throw new Error(`it did not answer within ${milliseconds} ms`) })
}

/** What an error of ioredis may tell. Redis repeats the arguments of a command that it does not know. */
export function plainRedisError (error: unknown): Error {
  // A transaction was discarded because of this one.
  const [cause = error] = (error as { readonly previousErrors?: readonly unknown[] } | undefined)?.previousErrors ?? []
  return plainError(cause, messageOf(cause).replace(/, with args beginning with: .*/s, ''))
}

/** ioredis tries again without end, and soon, because a job that cannot be stored is a 503. */
function retryStrategy (times: number): number {
  return Math.min(times * 50, 1000)
}
