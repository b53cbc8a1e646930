import t from 'tap'
import { opened } from '../support/opened.js'
import { postgresPair, postgresTls } from '../support/topologies/postgres.js'
import { refused, story } from './story.js'

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

t.test('TLS with a CA, and a role that may not create anything', async t => {
  const tls = await opened(t, 'PostgreSQL with TLS', () => postgresTls(t))
  if (tls === undefined) return
  const { server, ca, connectionString, schema } = tls
  const options = { ssl: { ca } }

  await t.test('the server restarts', async t => {
    await story(t, {
      name: 'PostgreSQL with TLS and least rights: restart',
      engine: 'pg-boss',
      options: { connectionString, schema, options },
      async fault () {
        await server.stop()
        await server.start()
      },
      writableWithin: 10_000
    })
  })

  await t.test('without the CA, with a wrong password, or in a schema of its own: the log says why', async t => {
    const guessed = connectionString.replace('worker', 'guarded:guessed')
    await refused(t, { engine: 'pg-boss', options: { connectionString, schema, options: { ssl: {} } }, reason: /certificate/, secret: 'guessed' })
    await refused(t, { engine: 'pg-boss', options: { connectionString: guessed, schema, options }, reason: /password authentication failed/, secret: 'guessed' })
    await refused(t, { engine: 'pg-boss', options: { connectionString, schema: 'other', options }, reason: /permission denied/, secret: 'guessed' })
  })
})
