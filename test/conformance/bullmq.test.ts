import { randomUUID } from 'node:crypto'
import { Writable } from 'node:stream'
import { setImmediate as turn } from 'node:timers/promises'
import { Redis } from 'ioredis'
import tap from 'tap'
import { bullmq } from '../../lib/engines/bullmq.js'
import { cork } from '../../lib/engines/cork.js'
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

tap.test('what requests store in one turn of the event loop leaves in few writes, and a single one at its end', async t => {
  const writes: number[] = []
  const connection = new Writable({
    write: (chunk: Buffer, _encoding, done) => { writes.push(chunk.length); done() },
    writev: (chunks, done) => { writes.push(chunks.reduce((sum, { chunk }) => sum + (chunk as Buffer).length, 0)); done() }
  })
  const store = (bytes: number): void => {
    cork(connection)
    connection.write(Buffer.alloc(bytes))
  }

  const end = async (): Promise<void> => {
    await turn()
    await turn()
  }

  store(1)
  t.strictSame(writes, [])
  await end()
  t.strictSame(writes.splice(0), [1])

  for (let i = 0; i < 20; i++) store(1_000)
  t.strictSame(writes, [9_000, 9_000], 'the server begins while more is written')
  await end()
  t.strictSame(writes.splice(0), [9_000, 9_000, 2_000])

  connection.write(Buffer.alloc(3))
  t.strictSame(writes, [3], 'and nothing else waits')
})
