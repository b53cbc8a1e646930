import t from 'tap'
import { opened } from '../support/opened.js'
import { postgresBehindBouncer, start } from '../support/topologies/postgres.js'
import { story } from './story.js'

t.setTimeout(240_000)

t.test('PostgreSQL behind PgBouncer in transaction mode', async t => {
  const topology = await opened(t, 'PgBouncer', () => postgresBehindBouncer(t))
  if (topology === undefined) return
  const { server, bouncer } = topology
  const options = { connectionString: bouncer.url }

  await t.test('PgBouncer restarts', async t => {
    await story(t, {
      name: 'PgBouncer: killed and started',
      engine: 'pg-boss',
      options,
      async fault () {
        await bouncer.kill()
        await start(bouncer)
      },
      writableWithin: 10_000
    })
  })

  await t.test('the server behind it restarts', async t => {
    await story(t, {
      name: 'PgBouncer: the server behind it restarts',
      engine: 'pg-boss',
      options,
      async fault () {
        await server.stop()
        await start(server)
      },
      writableWithin: 10_000
    })
  })
})
