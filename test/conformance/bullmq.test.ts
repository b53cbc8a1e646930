import { Writable } from 'node:stream'
import { setImmediate as turn } from 'node:timers/promises'
import { Queue } from 'bullmq'
import tap from 'tap'
import { bullmq } from '../../lib/engines/bullmq/index.js'
import { cork } from '../../lib/engines/cork.js'
import { openRedis } from '../support/redis.js'
import { conformance } from './suite.js'

conformance(async t => {
  const redis = await openRedis(t)
  return redis && {
    name: 'bullmq',
    engine: () => bullmq(redis),
    supports: { delay: true, key: true, tx: false, get: true, count: true, find: true, retry: true, cancel: true },
    async storeByHand (task, stored) {
      const queue = new Queue(task, { connection: { url: redis.connection }, prefix: redis.prefix })
      await queue.add(task, stored)
      await queue.close()
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
