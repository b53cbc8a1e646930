import t from 'tap'
import { opened } from '../support/opened.js'
import { until } from '../support/services.js'
import { admin, redisCluster, replicated } from '../support/topologies/redis.js'
import { story } from './story.js'

t.setTimeout(240_000)

t.test('Redis Cluster of three masters and three replicas', async t => {
  const cluster = await opened(t, 'redis-server and redis-cli', () => redisCluster(t))
  if (cluster === undefined) return
  const { nodes, ofSlot } = cluster
  const connection = { cluster: nodes.map(({ port }) => ({ host: '127.0.0.1', port })) }

  await t.test('the master of the slot is killed: its replica takes over', async t => {
    const { master } = await ofSlot()
    const redis = admin(t, master)
    await story(t, {
      name: 'Redis Cluster: master killed',
      engine: 'bullmq',
      options: { connection },
      replicated: () => replicated(redis, '{fbt}'),
      fault: () => master.kill(),
      writableWithin: 15_000
    })
    await master.start()
    await until(async () => await ofSlot().then(() => true, () => false), 'the killed master is a replica', 30_000)
  })

  await t.test('an operator orders a failover', async t => {
    const { master, replica } = await ofSlot()
    const redis = admin(t, master)
    await story(t, {
      name: 'Redis Cluster: failover by hand',
      engine: 'bullmq',
      options: { connection },
      replicated: () => replicated(redis, '{fbt}'),
      fault: () => admin(t, replica).cluster('FAILOVER'),
      writableWithin: 15_000
    })
  })
})
