import { PgBoss } from 'pg-boss'
import t, { type Test } from 'tap'
import { pgBoss } from '../../lib/engines/pg-boss/index.js'
import { defineTask, type TaskRecord } from '../../lib/index.js'
import { start } from '../support/app.js'
import { openPostgres } from '../support/postgres.js'

t.setTimeout(180_000)

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await new Promise(resolve => { setTimeout(resolve, 20) })
}

async function open (t: Test) {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return undefined
  const { connectionString, pool, schema } = postgres
  const starts: number[] = []
  const failed: number[] = []
  const state = { succeeds: false, hangs: false }
  const work = defineTask({
    name: 'work',
    retry: { attempts: 2, backoff: { type: 'fixed', delay: 10 } },
    async handler (_: unknown, { attempt, signal }) {
      starts.push(attempt)
      if (state.hangs) await new Promise((_resolve, reject) => { signal.addEventListener('abort', () => { reject(new Error('aborted')) }) })
      if (!state.succeeds) throw new Error(`no ${attempt}`)
    },
    onFailed (_payload, _error, { attempts }) { failed.push(attempts) }
  })
  const open = async (worker: boolean) => (await start(t, { tasks: [work], engine: pgBoss({ connectionString, schema }), worker, enqueueTimeout: 5_000, closeTimeout: 100 })).app
  const web = await open(false)
  await web.ready()
  const boss = new PgBoss({ connectionString, schema, supervise: false })
  await boss.start()
  t.teardown(() => boss.stop({ graceful: false }))
  const get = async (id: string): Promise<TaskRecord | undefined> => await web.backgroundTasks.get(work, id)
  return {
    pool,
    schema,
    boss,
    web,
    work,
    starts,
    failed,
    state,
    get,
    untilState: async (id: string, state: string) => { await until(async () => (await get(id))?.state === state) },
    /** A worker, until its end is asked for. */
    worker: async () => {
      const app = await open(true)
      await app.ready()
      return app
    }
  }
}

t.test('a job that a person puts back has all its attempts again, from 1, and fails for good once each time', async t => {
  const service = await open(t)
  if (service === undefined) return
  const { pool, schema, boss, web, work, starts, failed, state, get, untilState } = service
  const byHand = (set: string) => async (id: string) => { await pool.query(`update ${schema}.job set ${set} where id = $1`, [id]) }
  const ways: Record<string, (id: string) => Promise<unknown>> = {
    'boss.retry()': id => boss.retry('work', id),
    'boss.retry(), again': id => boss.retry('work', id),
    'an UPDATE to retry': byHand('state = \'retry\''),
    'an UPDATE to created': byHand('state = \'created\', retry_count = 0'),
    'an UPDATE to created that leaves all else': byHand('state = \'created\'')
  }
  const { id } = await web.backgroundTasks.enqueue(work)
  let worker = await service.worker()
  await untilState(id, 'failed')
  t.strictSame(starts.splice(0), [1, 2])
  for (const [way, putBack] of Object.entries(ways)) {
    await worker.close()
    t.match(await get(id), { state: 'failed', attempt: 2, error: { message: 'no 2' } }, `before ${way}`)
    await putBack(id)
    const record = await get(id)
    t.match(record, { state: 'pending', attempt: 0 }, way)
    t.notOk(record !== undefined && ('startedAt' in record || 'finishedAt' in record || 'error' in record), `${way}: as if it had never started`)
    worker = await service.worker()
    await until(() => starts.length === 2)
    await untilState(id, 'failed')
    t.strictSame(starts.splice(0), [1, 2], way)
  }
  t.strictSame(failed, Array(6).fill(2), 'onFailed was called once for each failure for good')

  state.succeeds = true
  await boss.retry('work', id)
  await untilState(id, 'succeeded')
  t.strictSame(starts.splice(0), [1])
  await byHand('state = \'retry\'')(id)
  await until(() => starts.length === 1)
  await untilState(id, 'succeeded')
  t.match(await get(id), { attempt: 1 }, 'one that had succeeded starts again, too')
})

t.test('a job that was cancelled while it waited for its second attempt starts again with its first when it is resumed', async t => {
  const service = await open(t)
  if (service === undefined) return
  const { pool, schema, boss, web, work, starts, get, untilState } = service
  const { id } = await web.backgroundTasks.enqueue(work)
  // As between two attempts.
  await pool.query(`update ${schema}.job set state = 'retry', started_on = now() where id = $1`, [id])
  t.match(await get(id), { state: 'retrying', attempt: 1 })
  await boss.cancel('work', id)
  t.match(await get(id), { state: 'skipped', attempt: 1 })
  await boss.resume('work', id)
  t.match(await get(id), { state: 'pending', attempt: 0 })
  await service.worker()
  await untilState(id, 'failed')
  t.strictSame(starts, [1, 2])
})

t.test('a job whose attempts crashes have used up never shows more attempts than it has', async t => {
  const service = await open(t)
  if (service === undefined) return
  const { pool, schema, web, work, starts, failed, get, untilState } = service
  const { id } = await web.backgroundTasks.enqueue(work)
  // As a process leaves it that died at the second attempt.
  await pool.query(`update ${schema}.job set state = 'active', retry_count = 1, started_on = now(), heartbeat_on = now() - interval '1 hour' where id = $1`, [id])
  t.match(await get(id), { state: 'running', attempt: 2 })
  await service.worker()
  await untilState(id, 'failed')
  t.strictSame(starts, [])
  t.strictSame(failed, [2])
  t.match(await get(id), { state: 'failed', attempt: 2 })
})

t.test('an attempt that a shutdown has returned does not count, also after the job was put back', async t => {
  const service = await open(t)
  if (service === undefined) return
  const { boss, web, work, starts, state, get, untilState } = service
  const { id } = await web.backgroundTasks.enqueue(work)
  const first = await service.worker()
  await untilState(id, 'failed')
  await first.close()
  state.hangs = true
  await boss.retry('work', id)
  starts.splice(0)
  const second = await service.worker()
  await until(() => starts.length === 1)
  t.match(await get(id), { state: 'running', attempt: 1 })
  await second.close()
  t.match(await get(id), { state: 'pending', attempt: 0 })
  state.hangs = false
  await service.worker()
  await until(() => starts.length === 3)
  t.strictSame(starts, [1, 1, 2])
  await untilState(id, 'failed')
})

t.test('a job of another program runs as long as its process lives, whatever limits it has for pg-boss', async t => {
  const service = await open(t)
  if (service === undefined) return
  const { pool, schema, boss, starts, failed, state, get, untilState } = service
  state.hangs = true
  const limits = { expireInSeconds: 1, heartbeatSeconds: 10, retryLimit: 0 }
  const id = await boss.send('work', { payload: 1 }, limits) ?? ''
  const old = await boss.send('work', { payload: 2 }, limits) ?? ''
  // As a job that was stored before this package declared the queue.
  await pool.query(`update ${schema}.job set heartbeat_seconds = null where id = $1`, [old])
  const first = await service.worker()
  await until(() => starts.length === 2)
  await pool.query(`update ${schema}.job set started_on = now() - interval '1 hour'`)
  await boss.supervise('work')
  t.strictSame([(await get(id))?.state, (await get(old))?.state], ['running', 'running'])
  state.hangs = false
  await first.close()
  await service.worker()
  for (const each of [id, old]) await untilState(each, 'failed')
  t.strictSame(starts.sort(), [1, 1, 1, 1, 2, 2], 'all attempts of the definition, and one that the shutdown returned')
  t.equal(failed.length, 2)
})
