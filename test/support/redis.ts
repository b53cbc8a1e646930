import { randomUUID } from 'node:crypto'
import { Redis } from 'ioredis'
import type { Test } from 'tap'
import { opened } from './opened.js'

export interface OpenRedis {
  readonly connection: string
  /** Of the test's own: what begins with it is gone behind it. */
  readonly prefix: string
}

/** The Redis of the machine, or of `REDIS_URL`. */
export async function openRedis (t: Test): Promise<OpenRedis | undefined> {
  const connection = process.env['REDIS_URL'] ?? 'redis://127.0.0.1:6379'
  const redis = new Redis(connection, { lazyConnect: true, retryStrategy: () => null })
  redis.on('error', () => {})
  t.teardown(() => { redis.disconnect() })
  if (await opened(t, 'Redis', async () => await redis.ping()) === undefined) return undefined
  const prefix = `fbt-test-${randomUUID().slice(0, 8)}`
  t.teardown(async () => {
    const keys = await redis.keys(`${prefix}:*`)
    if (keys.length > 0) await redis.del(keys)
  })
  return { connection, prefix }
}
