import { setTimeout as sleep } from 'node:timers/promises'
import type { Redis } from 'ioredis'
import t from 'tap'
import { opened } from '../support/opened.js'
import type { TestServer } from '../support/servers.js'
import { until } from '../support/services.js'
import { admin, redisSentinel, replicated } from '../support/topologies/redis.js'
import { story } from './story.js'

t.setTimeout(240_000)

t.test('Redis with a replica and three Sentinels', async t => {
  const redis = await opened(t, 'redis-server', () => redisSentinel(t))
  if (redis === undefined) return
  const { connection, servers, sentinels } = redis
  const admins = new Map(servers.map(server => [server, admin(t, server)]))
  const adminOf = (server: TestServer): Redis => admins.get(server) ?? admin(t, server)
  /** The server that was killed is a replica from now on. */
  const isWhole = async (): Promise<boolean> => /connected_slaves:1\b[^]*state=online/.test(await adminOf(await redis.primary()).info('replication'))

  await t.test('the primary is killed: a replica takes over', async t => {
    const primary = await redis.primary()
    await story(t, {
      name: 'Redis Sentinel: primary killed',
      engine: 'bullmq',
      options: { connection },
      replicated: () => replicated(adminOf(primary)),
      fault: () => primary.kill(),
      writableWithin: 15_000
    })
    await primary.start()
    await until(isWhole, 'the killed primary is a replica', 30_000)
  })

  await t.test('an operator orders a failover', async t => {
    const primary = await redis.primary()
    const sentinel = admin(t, sentinels[0] as TestServer)
    await story(t, {
      name: 'Redis Sentinel: failover by hand',
      engine: 'bullmq',
      options: { connection },
      replicated: () => replicated(adminOf(primary)),
      async fault () {
        await sentinel.call('SENTINEL', 'FAILOVER', 'jobs')
        // Until then it takes jobs that nobody copies.
        await until(async () => (await adminOf(primary).role())[0] === 'slave', 'the old primary is a replica', 20_000)
      },
      writableWithin: 15_000
    })
    await until(isWhole, 'the old primary is a replica', 30_000)
  })

  await t.test('the primary restarts while no Sentinel is there, and all come back after 3 s', async t => {
    const primary = await redis.primary()
    await story(t, {
      name: 'Redis Sentinel: no Sentinel for 3 s, primary restarts',
      engine: 'bullmq',
      options: { connection },
      async fault () {
        await Promise.all(sentinels.map(sentinel => sentinel.kill()))
        await primary.kill()
        await primary.start()
        await sleep(3_000)
        await Promise.all(sentinels.map(sentinel => sentinel.start()))
      },
      writableWithin: 15_000
    })
  })
})
