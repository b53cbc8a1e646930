import t from 'tap'
import { opened } from '../support/opened.js'
import { postgresPair, postgresTls } from '../support/topologies/postgres.js'
import { story } from './story.js'

t.setTimeout(240_000)

t.test('the primary is killed, and its replica is promoted behind the same name', async t => {
  const pair = await opened(t, 'PostgreSQL', () => postgresPair(t))
  if (pair === undefined) return
  const { primary, replica, name, url, promote } = pair
  await story(t, {
    name: 'PostgreSQL: primary killed, replica promoted',
    engine: 'pg-boss',
    options: { connectionString: url },
    async fault () {
      await primary.kill()
      await promote()
      name.pointTo(replica.port)
    },
    writableWithin: 10_000
  })
})

t.test('the primary falls silent, its connections stay, and its replica is promoted behind the same name', async t => {
  const pair = await opened(t, 'PostgreSQL', () => postgresPair(t))
  if (pair === undefined) return
  const { replica, name, url, promote } = pair
  await story(t, {
    name: 'PostgreSQL: primary silent, replica promoted',
    engine: 'pg-boss',
    options: { connectionString: url },
    async fault () {
      name.freeze()
      await promote()
      name.pointTo(replica.port)
    },
    writableWithin: 20_000
  })
})

t.test('the name points at a standby when the app starts', async t => {
  const pair = await opened(t, 'PostgreSQL', () => postgresPair(t))
  if (pair === undefined) return
  const { replica, name, url, promote } = pair
  name.pointTo(replica.port)
  await story(t, {
    name: 'PostgreSQL: a standby at the start, then promoted',
    engine: 'pg-boss',
    options: { connectionString: url },
    isDownAtStart: true,
    fault: promote,
    writableWithin: 10_000
  })
})

t.test('TLS with a CA, and a role that may not create anything: the server restarts', async t => {
  const tls = await opened(t, 'PostgreSQL with TLS', () => postgresTls(t))
  if (tls === undefined) return
  const { server, ca, connectionString, schema } = tls
  await story(t, {
    name: 'PostgreSQL with TLS and least rights: restart',
    engine: 'pg-boss',
    options: { connectionString, schema, options: { ssl: { ca } } },
    async fault () {
      await server.stop()
      await server.start()
    },
    writableWithin: 10_000
  })
})
