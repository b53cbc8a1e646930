import { randomUUID } from 'node:crypto'
import { Kysely, PostgresDialect, sql } from 'kysely'
import { fromKysely } from 'pg-boss'
import t from 'tap'
import type { Job } from '../../lib/engines/engine.js'
import { pgBoss } from '../../lib/engines/pg-boss/index.js'
import { PreparedStatements } from '../../lib/engines/pg-boss/prepared.js'
import { PgBossServer } from '../../lib/engines/pg-boss/server.js'
import { defineTask, type EnqueueOptions, type TaskSpec } from '../../lib/index.js'
import { start } from '../support/app.js'
import { openPostgres } from '../support/postgres.js'

const welcome = defineTask({ name: 'welcome', handler (_: { user: string }) {} })
const spec: TaskSpec = { name: 'welcome', attempts: 1, timeout: undefined, keep: { succeeded: 60, failed: 60 }, concurrency: 1 }
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

t.test('a plan that a pooler has lost is done without', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, pool, schema } = postgres
  const { log } = (await start(t)).app
  // With one connection each name is asked of the one that has it, or has lost it.
  const server = new PgBossServer({ connectionString, schema, schedule: false, registerInstance: false, max: 1 }, [spec], { log, error: error => { t.fail(error.message) }, cancelled () {} })
  await server.open()
  t.teardown(() => server.close())
  const db = server.web.boss.getDb()
  const names = async (): Promise<unknown[]> => (await db.executeSql('select name from pg_prepared_statements')).rows
  const ids = Array.from({ length: 5 }, () => randomUUID())
  const insert = async (i: number): Promise<void> => {
    t.strictSame(await server.insert('welcome', [{ id: ids[i] as string, data: { i } }], 2_000), [ids[i]])
  }
  await insert(0)
  t.equal((await names()).length, 1, 'the server keeps the plan')
  await insert(1)
  t.equal((await names()).length, 1)
  const ask = async (): Promise<void> => { t.strictSame(await server.query('select $1::int as n', [1]), [{ n: 1 }]) }
  await ask()
  await ask()
  t.equal((await names()).length, 2, 'of what a worker asks and tells it, too')
  await db.executeSql('deallocate all')
  await ask()
  await insert(2)
  await insert(3)
  t.equal((await names()).length, 0)
  t.strictSame(await server.insert('welcome', [{ id: ids[3] as string, data: {} }, { id: ids[4] as string, data: {} }], 2_000), [ids[4]], 'what is there is left out')
  const { rows } = await pool.query<{ n: number }>(`select count(*)::int as n from ${schema}.job`)
  t.strictSame(rows, [{ n: 5 }])

  const texts: string[] = []
  const changed = new PreparedStatements(() => ({ async executeSql (text: string) { texts.push(text.trim()); return { rows: [] } } }), 1_000)
  for (let i = 0; i < 2; i++) await changed.executeSql('select 1')
  t.strictSame(texts, ['select 1', 'select 1'], 'nor is a name asked of a pg-boss that wants a text')
  const broken = new PreparedStatements(() => ({ async executeSql () { throw new Error('broken') } }), 1_000)
  await t.rejects(broken.executeSql('select 1'), { message: 'broken' })
})

t.test('processes that store the same keys at once do not lock each other out', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, schema } = postgres
  const { log } = (await start(t)).app
  const engines = [0, 1].map(() => pgBoss({ connectionString, schema }))
  for (const engine of engines) {
    await engine.start([spec], { log, error: error => { t.fail(error.message) }, cancelled () {} })
    t.teardown(() => engine.stop({ drainMs: 0 }))
  }
  for (let round = 0; round < 20; round++) {
    const jobs: Job[] = Array.from({ length: 100 }, () => {
      return { id: randomUUID(), task: 'welcome', text: '1', payload: 1, delayMs: 0, keyed: true, enqueuedAt: Date.now(), headers: {}, requestId: undefined }
    })
    const [receipts = [], others = []] = await Promise.all(engines.map((engine, i) => engine.enqueue(i === 0 ? jobs : jobs.toReversed())))
    t.strictSame(receipts.map(({ id }) => id), jobs.map(({ id }) => id), 'receipts are in the order of the jobs')
    t.equal([...receipts, ...others].filter(({ duplicate }) => duplicate).length, 100, 'each is stored once')
  }
})
