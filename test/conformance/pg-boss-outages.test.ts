import { setTimeout as sleep } from 'node:timers/promises'
import { PgBoss } from 'pg-boss'
import t from 'tap'
import { pgBoss, type PgBossOptions } from '../../lib/engines/pg-boss/index.js'
import { defineTask } from '../../lib/index.js'
import { start } from '../support/app.js'
import { postgresServer } from '../support/servers.js'
import { outages } from './outages.js'
import { opened } from '../support/opened.js'
import { openPostgres } from '../support/postgres.js'

outages('pg-boss', async t => await opened(t, 'PostgreSQL', () => postgresServer()), (connectionString, schema) => pgBoss({ connectionString, schema }))

t.test('a job written by hand runs, and a malformed one fails at once', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, schema } = postgres
  const ran: unknown[] = []
  const note = defineTask({
    name: 'note',
    payload: { type: 'string' },
    handler (name: string, { requestId }) {
      ran.push([name, requestId])
    }
  })
  const { app, logs } = await start(t, { tasks: [note], engine: pgBoss({ connectionString, schema }), enqueueTimeout: 5_000 })
  await app.ready()
  const boss = new PgBoss({ connectionString, schema, supervise: false })
  await boss.start()
  t.teardown(() => boss.stop({ graceful: false }))
  await boss.send('note', { payload: 'by hand', requestId: 'r-1' })
  const ids: Array<string | null> = []
  for (const data of [null, { text: 1 }, { payload: 7 }, { payload: 'odd', headers: 'none', enqueuedAt: 'never' }]) ids.push(await boss.send('note', data as object))
  while (ran.length < 2) await sleep(20)
  const state = async (id: string | null): Promise<string | undefined> => (await app.backgroundTasks.get(note, id ?? ''))?.state
  while (await state(ids[2] ?? null) !== 'failed') await sleep(20)
  t.match(ran.map(run => (run as unknown[])[0]).sort(), ['by hand', 'odd'])
  t.match(await app.backgroundTasks.get(note, ids[2] ?? ''), { error: { code: 'FST_BGT_INVALID_PAYLOAD' }, attempt: 1 })
  t.equal(await app.backgroundTasks.get(note, 'no UUID'), undefined)
  t.equal(logs.filter(({ level, msg }) => level === 50 && msg === 'background task failed').length, 3)
})

t.test('wrong options are refused at the call, and no connection string is shown', async t => {
  const refused: Array<[options: unknown, message: RegExp]> = [
    [undefined, /pgBoss accepts an object/],
    [{}, /needs one of connectionString, db and options/],
    [{ connectionString: 'mysql://user:secret@host/database' }, /"connectionString" of pgBoss accepts a string such as postgres:.*; received a string, not shown here$/],
    [{ url: 'postgres://secret@host' }, /has no option "url"/],
    [{ connectionString: '' }, /"connectionString"/],
    [{ connectionString: 'postgres://secret@host', db: { async executeSql () { return { rows: [] } } } }, /either connectionString or db/],
    [{ db: {} }, /"db"/],
    [{ connectionString: 'postgres://secret@host', schema: '' }, /"schema"/],
    [{ connectionString: 'postgres://secret@host', options: 1 }, /"options"/],
    [{ connectionString: 'postgres://secret@host', options: { schema: 'no; good' } }, /refuses the options of pgBoss/]
  ]
  for (const [options, message] of refused) {
    t.throws(() => pgBoss(options as PgBossOptions), { code: 'FST_BGT_INVALID_OPTION', message })
    t.throws(() => pgBoss(options as PgBossOptions), { message: /^(?!.*secret)/ })
  }
})
