import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { PoolClient } from 'pg'
import t, { type Test } from 'tap'
import { pgBoss } from '../../lib/engines/pg-boss/index.js'
import { PgBossServer } from '../../lib/engines/pg-boss/server.js'
import { reclaim } from '../../lib/engines/pg-boss/statements.js'
import { PgBossWorker } from '../../lib/engines/pg-boss/worker.js'
import { defineTask, type EnqueueOptions, type TaskSpec } from '../../lib/index.js'
import { deferred, start } from '../support/app.js'
import { openPostgres, type OpenPostgres } from '../support/postgres.js'

t.setTimeout(180_000)

type Tx = NonNullable<EnqueueOptions['tx']>

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(20)
}

/** A transaction of somebody else, which stays open. */
async function transaction (t: Test, { pool }: OpenPostgres): Promise<PoolClient> {
  const client = await pool.connect()
  t.teardown(() => { client.release(true) })
  await client.query('begin')
  return client
}

t.test('a key that another transaction holds costs only its own requests, and only as long as it is held', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, schema } = postgres
  const order = defineTask({ name: 'order', handler () {} })
  const mail = defineTask({ name: 'mail', handler () {} })
  const { app } = await start(t, { tasks: [order, mail], engine: pgBoss({ connectionString, schema }), worker: false })
  app.get<{ Params: { key: string } }>('/keyed/:key', async request => { request.backgroundTasks.addTask(order, undefined, { key: request.params.key }) })
  app.get('/order', async request => { request.backgroundTasks.addTask(order) })
  app.get('/mail', async request => { request.backgroundTasks.addTask(mail) })
  await app.ready()
  const statuses = async (urls: readonly string[]): Promise<number[]> => await Promise.all(urls.map(async url => (await app.inject(url)).statusCode))

  const client = await transaction(t, postgres)
  const tx: Tx = { executeSql: (text, values) => client.query(text, values) }
  const keys = Array.from({ length: 20 }, (_, i) => `order ${i}`)
  for (const key of keys) await app.backgroundTasks.enqueue(order, undefined, { key, tx })
  t.strictSame((await client.query('show lock_timeout')).rows, [{ lock_timeout: '0' }], 'no limit is left in the transaction of the caller')

  const held = keys.map(key => `/keyed/${encodeURIComponent(key)}`)
  const strangers = ['/order', '/mail', '/keyed/another']
  for (let round = 0; round < 5; round++) {
    const [refused, ...others] = await Promise.all([statuses([held[0] as string]), ...Array.from({ length: 10 }, () => statuses(strangers))])
    t.strictSame(refused, [503], 'the key is held')
    t.ok(others.flat().every(status => status === 200), 'strangers are stored')
  }
  const [refused, others] = await Promise.all([statuses(held), statuses(Array.from({ length: 10 }, (_, i) => ['/order', '/mail', `/keyed/another-${i}`]).flat())])
  t.ok(refused.every(status => status === 503), 'many keys are held')
  t.ok(others.every(status => status === 200), `strangers are stored: ${others.join()}`)
  await client.query('rollback')
  await until(async () => (await statuses(held)).every(status => status === 200))
  t.strictSame(await app.backgroundTasks.enqueue(order, undefined, { key: 'order 0' }).then(({ duplicate }) => duplicate), true)
})

t.test('a job that another transaction holds holds up no other: neither verdicts nor signs of life', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, pool, schema } = postgres
  const ends = new Map(['held', 'other', 'long'].map(name => [name, deferred()]))
  const started: string[] = []
  const work = defineTask({
    name: 'work',
    async handler (name: string) {
      started.push(name)
      await ends.get(name)?.promise
    }
  })
  const { app } = await start(t, { tasks: [work], engine: pgBoss({ connectionString, schema }), closeTimeout: 100 })
  await app.ready()
  const ids: Record<string, string> = {}
  for (const name of ends.keys()) ids[name] = (await app.backgroundTasks.enqueue(work, name)).id
  const { held = '', other = '', long = '' } = ids
  await until(() => started.length === 3)
  const client = await transaction(t, postgres)
  await client.query(`select from ${schema}.job where id = $1 for update`, [held])
  const state = async (id: string): Promise<string | undefined> => (await app.backgroundTasks.get(work, id))?.state
  const heartbeat = async (): Promise<number> => Number((await pool.query<{ at: Date }>(`select heartbeat_on as at from ${schema}.job where id = $1`, [long])).rows[0]?.at)
  const before = await heartbeat()
  ends.get('held')?.resolve()
  ends.get('other')?.resolve()
  await until(async () => await state(other) === 'succeeded')
  t.equal(await state(held), 'running')
  await until(async () => await heartbeat() > before)
  await client.query('rollback')
  await until(async () => await state(held) === 'succeeded')
  ends.get('long')?.resolve()
  await until(async () => await state(long) === 'succeeded')
  t.strictSame(started.sort(), ['held', 'long', 'other'], 'each has started once')
})

t.test('the worker has connections of its own', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, schema } = postgres
  const { log } = (await start(t)).app
  const spec: TaskSpec = { name: 'any', attempts: 1, timeout: undefined, keep: { succeeded: 60, failed: 60 }, concurrency: 1 }
  const server = new PgBossServer({ connectionString, schema, schedule: false, registerInstance: false, max: 1 }, [spec], { log, error () {}, cancelled () {} })
  await server.open()
  t.teardown(() => server.close())
  await server.openForWorker()
  let isOver = false
  const blocked = server.web.boss.getDb().executeSql('select pg_sleep(2)').then(() => { isOver = true }, () => {})
  t.strictSame(await server.query('select 1 as n', []), [{ n: 1 }])
  t.strictSame(await server.fetch('any', 1), [])
  t.notOk(isOver, 'the one connection that stores jobs is still busy')
  await blocked
})

/** Opens workers, and notes what each asks its server. */
async function workers (t: Test, { connectionString, schema }: OpenPostgres, run: () => Promise<void>) {
  const { log } = (await start(t)).app
  const spec: TaskSpec = { name: 'any', attempts: 5, timeout: undefined, keep: { succeeded: 60, failed: 60 }, concurrency: 3 }
  return async () => {
    const server = new PgBossServer({ connectionString, schema, schedule: false, registerInstance: false }, [spec], { log, error () {}, cancelled () {} })
    await server.open()
    await server.openForWorker()
    const asked: string[] = []
    const query = server.query.bind(server)
    server.query = async (text, values) => {
      const rows = await query(text, values)
      asked.push(text.includes('WITH mine') ? `touched ${rows.length}` : text.includes('WITH lost') ? `searched ${rows.length}` : text.includes('unnest') ? 'polled' : 'other')
      return rows
    }
    const worker = new PgBossWorker(server, [spec], async () => {
      await run()
      return { kind: 'done', result: null }
    })
    t.teardown(async () => {
      await worker.stop(500)
      await server.close()
    })
    return { server, worker, asked }
  }
}

t.test('a job that another transaction held for longer than a dead process is silent starts once', { timeout: 60_000 }, async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { pool, schema } = postgres
  let starts = 0
  const end = deferred()
  const open = await workers(t, postgres, async () => {
    starts++
    await end.promise
  })
  const [one, two] = [await open(), await open()]
  await one.worker.start()
  const id = randomUUID()
  await one.server.insert('any', [{ id, data: { payload: 1 } }], 2_000)
  await until(() => starts === 1)
  await two.worker.start()
  await until(() => two.asked.includes('searched 0'))
  for (let round = 0; round < 2; round++) {
    const client = await transaction(t, postgres)
    await client.query(`update ${schema}.job set heartbeat_on = now() - interval '1 hour' where id = $1`, [id])
    one.asked.length = two.asked.length = 0
    await until(() => one.asked.includes('touched 0'))
    await client.query('commit')
    await until(() => one.asked.includes('touched 1') && two.asked.filter(what => what.startsWith('searched')).length > 2)
    t.equal(starts, 1)
  }
  await pool.query(`update ${schema}.job set heartbeat_on = now() - interval '1 hour' where id = $1`, [id])
  const search = async (ids: string[]): Promise<unknown> => (await pool.query(reclaim(schema), [['any'], ids])).rows
  t.strictSame(await search([]), [{ id, returned: false }], 'a job without a sign of life is left alone at first')
  t.strictSame(await search([id]), [{ id, returned: true }])
  end.resolve()
})

t.test('a waiting job that another transaction holds is not asked for again and again, and starts when it is let go', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { schema } = postgres
  let starts = 0
  const open = await workers(t, postgres, async () => { starts++ })
  const { server, worker, asked } = await open()
  const id = randomUUID()
  await server.insert('any', [{ id, data: { payload: 1 } }], 2_000)
  const client = await transaction(t, postgres)
  await client.query(`select from ${schema}.job where id = $1 for update`, [id])
  await worker.start()
  // That is after 5 to 7 s.
  await until(() => asked.some(what => what.startsWith('searched')))
  const polls = asked.filter(what => what === 'polled').length
  t.ok(polls < 40, `${polls} polls`)
  t.equal(starts, 0)
  await client.query('rollback')
  await until(() => starts === 1)
})

t.test('a user\'s executor whose listen fails, then never answers, or answers anything, holds up no sign of life', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { pool, schema } = postgres
  let calls = 0
  const hanging = async (): Promise<never> => {
    if (calls++ === 0) throw new Error('not now')
    return await new Promise<never>(() => {})
  }
  for (const listen of [hanging, async () => 7 as unknown as { close: () => Promise<void> }]) {
    const end = deferred()
    let starts = 0
    const work = defineTask({
      name: 'work',
      async handler () {
        starts++
        await end.promise
      }
    })
    const db = { executeSql: async (text: string, values?: unknown[]) => await pool.query(text, values), listen }
    const { app } = await start(t, { tasks: [work], engine: pgBoss({ db, schema }) })
    await app.ready()
    const { id } = await app.backgroundTasks.enqueue(work)
    await until(() => starts === 1)
    const heartbeat = async (): Promise<number> => Number((await pool.query<{ at: Date }>(`select heartbeat_on as at from ${schema}.job where id = $1`, [id])).rows[0]?.at)
    for (let i = 0; i < 2; i++) {
      const before = await heartbeat()
      await until(async () => await heartbeat() > before)
      t.ok(await heartbeat() - before < 8_000, `${await heartbeat() - before} ms`)
    }
    end.resolve()
    await app.close()
  }
})
