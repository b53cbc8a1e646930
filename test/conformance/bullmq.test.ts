import { randomUUID } from 'node:crypto'
import { Redis } from 'ioredis'
import { bullmq } from '../../lib/engines/bullmq.js'
import { opened } from '../support/opened.js'
import { conformance } from './suite.js'

const connection = process.env['REDIS_URL'] ?? 'redis://127.0.0.1:6379'

conformance(async t => {
  const redis = new Redis(connection, { lazyConnect: true, retryStrategy: () => null })
  redis.on('error', () => {})
  t.teardown(() => { redis.disconnect() })
  if (await opened(t, 'Redis', async () => await redis.ping()) === undefined) return undefined
  const prefix = `fbt-test-${randomUUID().slice(0, 8)}`
  return {
    name: 'bullmq',
    engine: () => bullmq({ connection, prefix }),
    supports: { delay: true, key: true, tx: false, get: true },
    cleanUp: async () => {
      const keys = await redis.keys(`${prefix}:*`)
      if (keys.length > 0) await redis.del(keys)
    }
  }
})
