import t from 'tap'
import { bullmq } from '../../lib/engines/bullmq/index.js'
import { defineTask } from '../../lib/index.js'
import { start } from '../support/app.js'
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

  await t.test('jobs are counted, found, put back, cancelled and waited for', async t => {
    let isAborted = false
    const note = defineTask({
      name: 'operated',
      retry: { attempts: 1 },
      async handler (kind: string, { signal }) {
        if (kind === 'hangs') await new Promise<void>(resolve => { signal.addEventListener('abort', () => { isAborted = true; resolve() }) })
        throw new Error('no')
      }
    })
    const { app } = await start(t, { tasks: [note], engine: bullmq({ connection }) })
    await app.ready()
    const tasks = app.backgroundTasks
    const { id } = await tasks.enqueue(note, 'fails')
    t.match(await tasks.result(note, id, { timeout: 10_000 }), { state: 'failed' })
    t.match((await tasks.find(note, { state: 'failed' })).records, [{ id }])
    t.equal(await tasks.retry(note, id), true)
    await until(async () => (await tasks.count(note)).failed === 1)
    const hanging = await tasks.enqueue(note, 'hangs', { key: 'k' })
    await until(async () => (await tasks.count(note)).running === 1)
    t.equal(await tasks.cancel(note, hanging.id), true)
    t.match(await tasks.get(note, hanging.id), { state: 'skipped' })
    await until(() => isAborted)
    t.match(await tasks.enqueue(note, 'fails', { key: 'k' }), { duplicate: false })
    const add = admin(t, (await ofSlot()).master).pipeline()
    for (let n = 0; n < 5_100; n++) add.hset(`{fbt}:operated:${n}`, { name: 'operated', data: '1', timestamp: n }).zadd('{fbt}:operated:failed', Date.now(), n)
    await add.exec()
    await until(async () => (await tasks.find(note, { state: 'failed', limit: 3 })).records[2]?.id === '5099')
  })

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
