/** What an operator does to jobs of pg-boss, beyond the suite of all placements: other processes, other programs, and what goes wrong. */
import { randomUUID } from 'node:crypto'
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import pg from 'pg'
import { PgBoss } from 'pg-boss'
import t, { type Test } from 'tap'
import { pgBoss } from '../../lib/engines/pg-boss/index.js'
import { EndListener } from '../../lib/engines/pg-boss/ends.js'
import { cancelKeeping, freeingKeys, retryAnew } from '../../lib/engines/pg-boss/texts.js'
import { defineTask, type AnyTaskDefinition, type FastifyBackgroundTasksOptions, type JobState } from '../../lib/index.js'
import { deferred, start } from '../support/app.js'
import { openPostgres } from '../support/postgres.js'
import { postgresServer } from '../support/servers.js'
import { optionsOf, startService } from '../support/services.js'

t.setTimeout(240_000)

const STATES: readonly JobState[] = ['pending', 'delayed', 'running', 'retrying', 'succeeded', 'failed', 'skipped', 'abandoned']

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(10)
}

async function open (t: Test, tasks: readonly AnyTaskDefinition[]) {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return undefined
  const { connectionString, schema, pool } = postgres
  const app = async (options: FastifyBackgroundTasksOptions): Promise<FastifyInstance> => {
    const { app } = await start(t, { tasks, engine: pgBoss({ connectionString, schema }), enqueueTimeout: 5_000, closeTimeout: 100, ...options })
    await app.ready()
    return app
  }
  const web = await app({ worker: false })
  const boss = new PgBoss({ connectionString, schema, supervise: false })
  await boss.start()
  t.teardown(() => boss.stop({ graceful: false }))
  const stateOf = async (definition: AnyTaskDefinition, id: string): Promise<JobState | undefined> => (await web.backgroundTasks.get(definition as never, id))?.state
  return {
    ...postgres,
    web,
    boss,
    stateOf,
    untilState: async (definition: AnyTaskDefinition, id: string, state: JobState) => { await until(async () => await stateOf(definition, id) === state) },
    worker: async (options: FastifyBackgroundTasksOptions = {}) => await app(options),
    /** A worker that no notification reaches, as behind PgBouncer. */
    deafWorker: async (options: FastifyBackgroundTasksOptions = {}) =>
      await app({ engine: pgBoss({ db: { executeSql: async (text, values) => await pool.query(text, values) }, schema }), ...options })
  }
}

/** A definition whose handlers hang until they are let go, or until they are aborted. */
function hanging (name: string) {
  const runs: Array<{ kind: string, attempt: number, signal: AbortSignal, end: () => void }> = []
  const definition = defineTask({
    name,
    retry: { attempts: 2, backoff: { type: 'fixed', delay: 10 } },
    async handler (kind: string, { attempt, signal }) {
      const { promise, resolve } = deferred()
      runs.push({ kind, attempt, signal, end: resolve })
      if (kind === 'fails') throw new Error('no')
      if (kind !== 'quick') await promise
      return kind
    }
  })
  return { definition, runs }
}

t.test('a message to the workers that fails leaves no subscription that nobody ends', async t => {
  let [open, told] = [0, 0]
  const server = {
    channel: 'channel',
    endsChannel: 'ends',
    async listen () {
      open++
      return { async close () { open-- } }
    },
    async notify () {
      if (told++ % 2 === 0) throw new Error('connection lost')
    }
  }
  const listener = new EndListener(server as never)
  for (let i = 0; i < 3; i++) {
    const ends = await Promise.allSettled(['a', 'b', 'c'].map(async queue => await listener.watch(queue, () => {})))
    t.equal(open, 1)
    for (const end of ends) if (end.status === 'fulfilled') end.value()
    await sleep(0)
    t.equal(open, 0)
  }
})

t.test('a worker that no notification reaches hears of a cancel by its signs of life, within 5 s', async t => {
  const { definition, runs } = hanging('deaf')
  const service = await open(t, [definition])
  if (service === undefined) return
  const { web, boss, stateOf, untilState } = service
  await service.deafWorker()
  for (const cancel of [
    async (id: string) => { t.equal(await web.backgroundTasks.cancel(definition, id), true) },
    async (id: string) => { await boss.cancel('deaf', id) }
  ]) {
    const { id } = await web.backgroundTasks.enqueue(definition, 'one')
    await untilState(definition, id, 'running')
    await until(() => runs.length === 1)
    const from = performance.now()
    await cancel(id)
    const { signal } = runs.pop() as typeof runs[number]
    if (!signal.aborted) await once(signal, 'abort')
    t.ok(performance.now() - from < 5_000, `${performance.now() - from} ms`)
    t.match(signal.reason, { code: 'FST_BGT_CANCELLED' })
    t.equal(await stateOf(definition, id), 'skipped')
  }
})

t.test('a job that was cancelled is not started again when its process dies right after, nor when a shutdown returns it', async t => {
  const note = defineTask({ name: 'note', handler (_: { n: number, ms: number }) {} })
  const { definition, runs } = hanging('returned')
  const service = await open(t, [note, definition])
  if (service === undefined) return
  const { web, pool, schema, connectionString, stateOf, untilState } = service
  const child = await startService(t, { engine: 'pg-boss', options: optionsOf('pg-boss', connectionString, schema), isWorker: true })
  const killed = await web.backgroundTasks.enqueue(note, { n: 1, ms: 60_000 })
  await until(() => child.started.length === 1)
  t.equal(await web.backgroundTasks.cancel(note, killed.id), true)
  await child.kill()
  await pool.query(`update ${schema}.job set heartbeat_on = now() - interval '1 hour', started_on = now() - interval '1 hour'`)

  const first = await service.deafWorker({ tasks: [definition] })
  const returned = await web.backgroundTasks.enqueue(definition, 'one')
  await until(() => runs.length === 1)
  await untilState(definition, returned.id, 'running')
  const closed = first.close()
  t.equal(await web.backgroundTasks.cancel(definition, returned.id), true)
  await closed
  await service.worker()
  const last = [await web.backgroundTasks.enqueue(note, { n: 2, ms: 0 }), await web.backgroundTasks.enqueue(definition, 'quick')]
  await untilState(note, last[0]?.id ?? '', 'succeeded')
  await untilState(definition, last[1]?.id ?? '', 'succeeded')
  t.strictSame(runs.map(({ kind }) => kind), ['one', 'quick'])
  t.strictSame([await stateOf(note, killed.id), await stateOf(definition, returned.id)], ['skipped', 'skipped'])
  const { rows } = await pool.query<{ kept: number }>(`select distinct deletion_seconds as kept from ${schema}.job where state = 'cancelled'`)
  t.strictSame(rows, [{ kept: 604_800 }], 'kept as a failed one')
})

t.test('a cancelled job that a person puts back with pg-boss runs again, from 1', async t => {
  const { definition, runs } = hanging('put-back')
  const service = await open(t, [definition])
  if (service === undefined) return
  const { web, boss, pool, schema, untilState } = service
  const ways: Record<string, (id: string) => Promise<unknown>> = {
    'boss.resume()': async id => await boss.resume('put-back', id),
    'an UPDATE to retry': async id => await pool.query(`update ${schema}.job set state = 'retry' where id = $1`, [id])
  }
  for (const [way, putBack] of Object.entries(ways)) {
    const delayed = await web.backgroundTasks.enqueue(definition, 'quick', { delay: 100 })
    t.equal(await web.backgroundTasks.cancel(definition, delayed.id), true)
    await putBack(delayed.id)
    const worker = await service.worker()
    await untilState(definition, delayed.id, 'succeeded')
    const running = await web.backgroundTasks.enqueue(definition, 'one')
    await until(() => runs.length === 2)
    t.equal(await web.backgroundTasks.cancel(definition, running.id), true)
    // Before the worker has heard of it, or after that.
    await putBack(running.id)
    const [, before] = runs
    await until(() => before?.signal.aborted === true && runs.length === 3)
    t.strictSame(runs.map(({ attempt }) => attempt), [1, 1, 1], way)
    runs.at(-1)?.end()
    await untilState(definition, running.id, 'succeeded')
    t.match(await web.backgroundTasks.get(definition, running.id), { attempt: 1, result: 'one' })
    runs.splice(0)
    await worker.close()
  }
})

t.test('the verdict of a start that was cancelled says nothing of the job that was stored under its key since', async t => {
  const { definition, runs } = hanging('again')
  const service = await open(t, [definition])
  if (service === undefined) return
  const { web, stateOf, untilState } = service
  const first = await service.deafWorker({ worker: { concurrency: 1 } })
  const { id } = await web.backgroundTasks.enqueue(definition, 'old', { key: 'k' })
  await until(() => runs.length === 1)
  await untilState(definition, id, 'running')
  await service.worker()
  t.equal(await web.backgroundTasks.cancel(definition, id), true)
  t.strictSame(await web.backgroundTasks.enqueue(definition, 'new', { key: 'k' }), { id, duplicate: false })
  await until(() => runs.length === 2)
  runs[0]?.end()
  await first.close()
  t.equal(await stateOf(definition, id), 'running')
  runs[1]?.end()
  await untilState(definition, id, 'succeeded')
  t.match(await web.backgroundTasks.get(definition, id), { attempt: 1, result: 'new' })
})

t.test('a process that is about to start a job under a key whose cancelled start it still runs ends that one first', async t => {
  const { definition, runs } = hanging('both')
  const service = await open(t, [definition])
  if (service === undefined) return
  const { web, untilState } = service
  await service.deafWorker()
  const { id } = await web.backgroundTasks.enqueue(definition, 'old', { key: 'k' })
  await until(() => runs.length === 1)
  await untilState(definition, id, 'running')
  t.equal(await web.backgroundTasks.cancel(definition, id), true)
  await web.backgroundTasks.enqueue(definition, 'new', { key: 'k' })
  await until(() => runs.length === 2)
  t.ok(runs[0]?.signal.aborted)
  t.notOk(runs[1]?.signal.aborted)
  runs[1]?.end()
  await untilState(definition, id, 'succeeded')
})

t.test('two processes that store the key of a cancelled job: one stores it, and the other finds it, also in transactions and in groups', async t => {
  const { definition } = hanging('raced')
  const service = await open(t, [definition])
  if (service === undefined) return
  const { web, pool } = service
  const other = await service.worker({ worker: false })
  for (let i = 0; i < 30; i++) {
    const { id } = await web.backgroundTasks.enqueue(definition, 'one', { key: 'k', delay: 60_000 })
    t.equal(await web.backgroundTasks.cancel(definition, id), true)
    const receipts = await Promise.all([web, other, web, other].map(async ({ backgroundTasks }, n) => await backgroundTasks.enqueue(definition, `${n}`, { key: n < 2 ? 'k' : `${n} ${i}`, delay: 60_000 })))
    t.strictSame(receipts.map(({ duplicate }) => duplicate).slice(0, 2).toSorted(), [false, true])
    t.strictSame(receipts.map(({ duplicate }) => duplicate).slice(2), [false, false])
    const both = await Promise.all([web, other].map(async ({ backgroundTasks }) => await backgroundTasks.cancel(definition, id)))
    t.strictSame(both.toSorted(), [false, true])
  }
  const client = await pool.connect()
  t.teardown(() => { client.release(true) })
  const tx = { executeSql: async (text: string, values?: unknown[]) => await client.query(text, values) }
  for (const [end, state] of [['rollback', 'skipped'], ['commit', 'delayed']] as const) {
    await client.query('begin')
    const { id, duplicate } = await web.backgroundTasks.enqueue(definition, 'in tx', { key: 'k', delay: 60_000, tx })
    t.notOk(duplicate)
    await client.query(end)
    t.equal(await service.stateOf(definition, id), state)
  }
})

t.test('retry starts a failed job of another program with its first attempt, too, and wakes an idle worker', async t => {
  const { definition, runs } = hanging('foreign')
  const service = await open(t, [definition])
  if (service === undefined) return
  const { web, boss, pool, schema, untilState } = service
  const id = await boss.send('foreign', { payload: 'quick' }, { retryLimit: 0 }) ?? ''
  await pool.query(`update ${schema}.job set state = 'failed', started_on = now(), completed_on = now() where id = $1`, [id])
  await service.worker()
  t.equal(await web.backgroundTasks.retry(definition, id), true)
  await untilState(definition, id, 'succeeded')
  t.match(await web.backgroundTasks.get(definition, id), { attempt: 1 })
  const took: number[] = []
  for (let i = 0; i < 5; i++) {
    await pool.query(`update ${schema}.job set state = 'failed' where id = $1`, [id])
    const before = runs.length
    const from = performance.now()
    t.equal(await web.backgroundTasks.retry(definition, id), true)
    await until(() => runs.length > before)
    took.push(performance.now() - from)
    await untilState(definition, id, 'succeeded')
  }
  t.ok(Math.min(...took) < 250, `${took.map(Math.round).join()} ms: it does not wait for a poll`)
})

t.test('find and count agree with get in every state, whoever stored the jobs, whatever their data is', async t => {
  const { definition } = hanging('odd')
  const service = await open(t, [definition])
  if (service === undefined) return
  const { web, boss, pool, schema } = service
  const at = Date.parse('2026-01-02T03:04:05.678Z')
  const mark = 'fastify-background-tasks'
  const data: unknown[] = [
    ...Array.from({ length: 10 }, () => ({ payload: 1, enqueuedAt: at })), ...Array.from({ length: 4 }, (_, i) => ({ payload: 1, enqueuedAt: at - i })),
    ...[at + 0.7, -at, 'x', null, true, {}, [at], 1e300, -1e300, 8.64e15, -8.64e15, 9e15, Date.now() + 60_000].map(enqueuedAt => ({ payload: 1, enqueuedAt })),
    { enqueuedAt: at }, { [mark]: 'no JSON', enqueuedAt: at }, { [mark]: '{"payload":"x\\u0000"}', enqueuedAt: at }, { [mark]: 7, enqueuedAt: at }, { payload: 1 }, {}
  ]
  await boss.insert('odd', data.map(data => ({ data: data as object })))
  for (const json of ['["payload"]', '"payload"', '7', 'null', '[]']) await pool.query(`update ${schema}.job set data = $1 where id = $2`, [json, await boss.send('odd', {})])
  await pool.query(`update ${schema}.job set data = null where id = $1`, [await boss.send('odd', {})])
  await pool.query(`insert into ${schema}.job_common (name, data, created_on) select 'odd', '{"payload": 1}', now() - i * interval '0.3337 ms' from generate_series(1, 20) i`)
  const { rows } = await pool.query<{ id: string }>(`select id from ${schema}.job where name = 'odd'`)
  const ids = rows.map(({ id }) => id)
  const check = async (): Promise<void> => {
    const records = await Promise.all(ids.map(async id => await web.backgroundTasks.get(definition, id)))
    const expected = new Map(STATES.map(state => [state, records.filter(record => record?.state === state)
      .toSorted((a, b) => Date.parse(b?.enqueuedAt ?? '') - Date.parse(a?.enqueuedAt ?? '') || ((a?.id ?? '') < (b?.id ?? '') ? 1 : -1))]))
    for (const state of STATES) {
      const pages: unknown[] = []
      let after: string | undefined
      do {
        const page = await web.backgroundTasks.find(definition, { state, limit: 7, after })
        pages.push(...page.records)
        after = page.next
      } while (after !== undefined)
      t.strictSame(pages, expected.get(state), state)
    }
    const { pending, delayed, running, retrying, failed } = await web.backgroundTasks.count(definition)
    for (const [state, count] of Object.entries({ pending, delayed, running, retrying, failed })) t.equal(count, expected.get(state as JobState)?.length, `count of ${state}`)
    t.equal((await web.backgroundTasks.find(definition, { state: 'pending', payload: true, limit: 500 })).records.length, expected.get('pending')?.length)
  }
  await check()
  const sets = [
    'state = \'failed\', completed_on = now(), output = \'"x"\'', 'state = \'completed\', completed_on = now(), started_on = now()', 'state = \'cancelled\', completed_on = now()',
    'state = \'active\', started_on = now()', 'state = \'retry\', started_on = now()', 'state = \'retry\', started_on = now(), retry_count = 1, retry_limit = 1000000002',
    'state = \'retry\', retry_count = 1', 'state = \'retry\'', 'state = \'retry\', start_after = now() + interval \'1 hour\'', 'start_after = now() + interval \'1 hour\'',
    'start_after = now() + interval \'1 hour\', state = \'retry\', retry_limit = 1000000002, retry_count = 2', 'start_after = now() + interval \'1 hour\', state = \'retry\', retry_count = 2'
  ]
  for (const [i, id] of ids.entries()) await pool.query(`update ${schema}.job set ${sets[i % sets.length]} where id = $1`, [id])
  await check()
  const forged = (text: string): string => Buffer.from(text).toString('base64url')
  for (const after of ['8640000000000000 x', '-8640000000000000 x', `0 ${'x'.repeat(5_000)}`, '5 \'; drop table job; --']) {
    const { records } = await web.backgroundTasks.find(definition, { state: 'failed', after: forged(after), limit: 1 })
    t.ok(records.length <= 1, 'a position that somebody has made')
  }
  await pool.query(`update ${schema}.job set completed_on = now() - interval '1 year' where state in ('failed', 'completed', 'cancelled')`)
  for (const state of ['failed', 'succeeded', 'skipped'] as const) t.strictSame(await web.backgroundTasks.find(definition, { state }), { records: [] }, `${state}: its time is over`)
  t.equal((await web.backgroundTasks.count(definition)).failed, 0)
})

t.test('a hundred waits cost one connection, and workers tell of ends only while somebody waits', async t => {
  const { definition, runs } = hanging('told')
  const service = await open(t, [definition])
  if (service === undefined) return
  const { web, pool, schema, connectionString, untilState } = service
  await service.worker({ worker: { concurrency: 200 } })
  const { rows: [row] } = await pool.query<{ channel: string }>(`select 'pgboss_' || left(encode(sha224('${schema}'), 'hex'), 24) || '_ends' as channel`)
  const listener = new pg.Client({ connectionString })
  await listener.connect()
  t.teardown(() => listener.end())
  await listener.query(`listen "${row?.channel}"`)
  const told: string[] = []
  listener.on('notification', ({ payload = '' }) => { told.push(payload) })
  const listening = async (): Promise<number> => {
    const { rows } = await pool.query('select 1 from pg_stat_activity where query = $1', [`LISTEN "${row?.channel}"`])
    return rows.length
  }
  const quick = await web.backgroundTasks.enqueue(definition, 'quick')
  await untilState(definition, quick.id, 'succeeded')
  const receipts = await Promise.all(Array.from({ length: 100 }, async () => await web.backgroundTasks.enqueue(definition, 'one')))
  await until(() => runs.length === 101)
  t.equal(await listening(), 0)
  const ends: number[] = []
  const waits = receipts.map(async ({ id }) => {
    const record = await web.backgroundTasks.result(definition, id, { timeout: 60_000 })
    ends.push(performance.now())
    return record
  })
  await until(async () => await listening() === 1)
  // The worker hears that somebody waits before it hears this.
  const probe = await web.backgroundTasks.enqueue(definition, 'quick')
  await until(() => told.some(message => message.includes(probe.id)))
  t.notOk(told.some(message => message.includes(quick.id)), 'nothing, until somebody waits')
  t.equal(await listening(), 1)
  for (const { end } of runs) end()
  t.strictSame((await Promise.all(waits)).map(record => record?.state), receipts.map(() => 'succeeded'))
  t.ok(told.length < 50, `${told.length} messages of a hundred ends`)
})

t.test('health says whether the server can be reached', async t => {
  const server = await postgresServer().catch(() => undefined)
  if (server === undefined) {
    t.comment('there is no PostgreSQL to start')
    return
  }
  t.teardown(() => server.remove())
  await server.start()
  const { definition } = hanging('away')
  const apps = await Promise.all([true, false].map(async worker => (await start(t, { tasks: [definition], engine: pgBoss({ connectionString: server.url }), worker, enqueueTimeout: 500 })).app))
  for (const app of apps) await app.ready()
  await until(() => apps.every(app => app.backgroundTasks.health().connected))
  for (const stop of ['stop', 'kill'] as const) {
    await server[stop]()
    await until(() => apps.every(app => !app.backgroundTasks.health().connected))
    const [app] = apps as [FastifyInstance]
    const id = randomUUID()
    for (const call of [app.backgroundTasks.count(definition), app.backgroundTasks.find(definition, { state: 'failed' }), app.backgroundTasks.retry(definition, id), app.backgroundTasks.cancel(definition, id)]) {
      await t.rejects(call as Promise<unknown>, { code: 'FST_BGT_ENGINE_UNAVAILABLE' })
    }
    await server.start()
    await until(() => apps.every(app => app.backgroundTasks.health().connected))
  }
})

t.test('a statement of pg-boss that is not as it is known stays as it is', t => {
  for (const change of [(text: string) => freeingKeys(200, text), (text: string) => cancelKeeping(1, text), retryAnew]) {
    for (const text of ['SELECT 1', 'INSERT INTO job VALUES ($1) ON CONFLICT DO NOTHING', 'WITH ins AS (INSERT INTO a.job)', 'UPDATE job SET state = \'cancelled\' WHERE id = $2', 'SET retry_limit = retry_limit + 1']) {
      t.equal(change(text), text)
    }
  }
  t.end()
})
