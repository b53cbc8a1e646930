import t from 'tap'
import { opened } from '../support/opened.js'
import { proxyTo, redisOf } from '../support/servers.js'
import { admin, redisPair, redisTls, replicated, started } from '../support/topologies/redis.js'
import { refused, story } from './story.js'

t.setTimeout(240_000)

t.test('READONLY: the name points at the promoted replica, and the connections to the old primary stay up', async t => {
  const pair = await opened(t, 'redis-server', () => redisPair(t))
  if (pair === undefined) return
  const [a, b] = pair
  const name = await proxyTo(a.port)
  t.teardown(() => { name.close() })
  const [adminA, adminB] = [admin(t, a), admin(t, b)]
  await story(t, {
    name: 'Redis: primary and replica swap, connections stay',
    engine: 'bullmq',
    options: { connection: `redis://127.0.0.1:${name.port}` },
    replicated: () => replicated(adminA),
    async fault () {
      await adminB.replicaof('NO', 'ONE')
      name.pointTo(b.port)
      await adminA.replicaof('127.0.0.1', b.port)
    },
    writableWithin: 5_000
  })
})

t.test('TLS with a CA, and a user of the least rights', async t => {
  const tls = await opened(t, 'redis-server with TLS', () => redisTls(t))
  if (tls === undefined) return
  const { server, ca } = tls
  const connection = { host: '127.0.0.1', port: server.port, username: 'jobs', password: 'secret', tls: { ca } }

  await t.test('the server restarts', async t => {
    await story(t, {
      name: 'Redis with TLS and least rights: restart',
      engine: 'bullmq',
      options: { connection },
      async fault () {
        await server.kill()
        await server.start()
      },
      writableWithin: 5_000
    })
  })

  await t.test('without the CA, with a wrong password, or with keys of somebody else: the log says why', async t => {
    await refused(t, { engine: 'bullmq', options: { connection: { ...connection, tls: {} } }, reason: /certificate/, secret: 'secret' })
    await refused(t, { engine: 'bullmq', options: { connection: { ...connection, password: 'guessed' } }, reason: /WRONGPASS/, secret: 'guessed' })
    await refused(t, { engine: 'bullmq', options: { connection, prefix: 'shop' }, reason: /NOPERM|No permissions/, secret: 'secret' })
  })
})

t.test('Valkey: the server is killed, and started again', async t => {
  const server = await opened(t, 'valkey-server', async () => await started(t, await redisOf('valkey-server', () => [])), 'REQUIRE_VALKEY')
  if (server === undefined) return
  await story(t, {
    name: 'Valkey: kill and start',
    engine: 'bullmq',
    options: { connection: `redis://127.0.0.1:${server.port}` },
    async fault () {
      await server.kill()
      await server.start()
    },
    writableWithin: 5_000
  })
})
