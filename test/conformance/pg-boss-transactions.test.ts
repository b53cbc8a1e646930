import { Kysely, PostgresDialect, sql } from 'kysely'
import { fromKysely } from 'pg-boss'
import t from 'tap'
import { pgBoss } from '../../lib/engines/pg-boss.js'
import { defineTask, type EnqueueOptions } from '../../lib/index.js'
import { start } from '../support/app.js'
import { openPostgres } from '../support/postgres.js'

const welcome = defineTask({ name: 'welcome', handler (_: { user: string }) {} })
type Tx = NonNullable<EnqueueOptions['tx']>

t.test('a job enqueued in a transaction is invisible before its commit, and gone after its rollback', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, pool, schema } = postgres
  const { app } = await start(t, { tasks: [welcome], engine: pgBoss({ connectionString, schema }), worker: false, enqueueTimeout: 5_000 })
  await app.ready()
  await pool.query(`create table ${schema}.users (name text primary key)`)
  const kysely = new Kysely<unknown>({ dialect: new PostgresDialect({ pool }) })

  const insert = (user: string): string => `insert into ${schema}.users values ('${user}')`
  const ways: Record<string, (user: string, work: (tx: Tx) => Promise<void>) => Promise<void>> = {
    async pg (user, work) {
      const client = await pool.connect()
      try {
        await client.query('begin')
        await client.query(insert(user))
        await work({ executeSql: (text, values) => client.query(text, values) })
        await client.query('commit')
      } catch (error) {
        await client.query('rollback')
        throw error
      } finally {
        client.release()
      }
    },
    async kysely (user, work) {
      await kysely.transaction().execute(async trx => {
        await sql.raw(insert(user)).execute(trx)
        await work(fromKysely(trx))
      })
    }
  }
  for (const [name, inTransaction] of Object.entries(ways)) {
    let id = ''
    await inTransaction(`${name} committed`, async tx => {
      ({ id } = await app.backgroundTasks.enqueue(welcome, { user: name }, { tx }))
      t.equal(await app.backgroundTasks.get(welcome, id), undefined, `${name}: invisible before the commit`)
    })
    t.match(await app.backgroundTasks.get(welcome, id), { state: 'pending' }, `${name}: there after it`)
    await t.rejects(inTransaction(`${name} rolled back`, async tx => {
      ({ id } = await app.backgroundTasks.enqueue(welcome, { user: name }, { tx }))
      throw new Error('no')
    }), { message: 'no' })
    t.equal(await app.backgroundTasks.get(welcome, id), undefined, `${name}: gone after the rollback`)
  }
  const { rows } = await pool.query<{ name: string }>(`select name from ${schema}.users order by name`)
  t.strictSame(rows.map(row => row.name), ['kysely committed', 'pg committed'])
})
