import { randomUUID } from 'node:crypto'
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { PgBoss } from 'pg-boss'
import t from 'tap'
import type { Job } from '../../lib/engines/engine.js'
import { pgBoss } from '../../lib/engines/pg-boss/index.js'
import { inKeyOrder, isStorable, keyOrder, MARK } from '../../lib/engines/pg-boss/values.js'
import { defineTask, type Json, type TaskEnqueueMessage } from '../../lib/index.js'
import { start } from '../support/app.js'
import { openPostgres } from '../support/postgres.js'

t.setTimeout(180_000)

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await new Promise(resolve => { setTimeout(resolve, 20) })
}

/** A value that a JSON text stands for: keys such as `__proto__` are its own. */
const parse = (json: string): Json => JSON.parse(json) as Json

const VALUES: Record<string, Json> = {
  nothing: null,
  'keys in the order of jsonb': { a: 1, b: { x: 1, yy: 2 }, zebra: [] },
  'keys in another order': { zebra: 1, a: 2 },
  'keys within lists': [{ b: 1, a: [{ d: 1, c: 2 }, 1, { e: 1 }] }, { a: 1, b: 2 }, {}, [[{ y: 1, x: 1 }]]],
  'keys of other alphabets': { ü: 1, zz: 2, é: 3, ab: 4, '\uffff': 5, '😀': 6, abc: 7 },
  'keys that objects have': parse('{"toString":1,"__proto__":{"z":1,"a":2},"constructor":3}'),
  'keys that are numbers': { 10: 'a', 9: 'b', a: 'c' },
  'our own key': { [MARK]: 'text' },
  'our own key and a value': { value: 1, [MARK]: [['b', 'a']] },
  'a null character': { text: 'a\u0000b' },
  'half an emoji': { subject: 'Happy birthday 😀'.slice(0, 16) },
  'a whole emoji': { subject: '😀' },
  'a key that is half an emoji': { ['😀'.slice(1)]: { b: 1, a: 2 } },
  'text that looks like an escape': { b: '\\u0000 \\ud83d', a: '\\' },
  numbers: [1e21, 1e-7, -0.5, 1.7976931348623157e308, 5e-324],
  'deep nesting': parse('['.repeat(3_000) + ']'.repeat(3_000))
}

t.test('payloads, headers, request ids, results and errors come back as they were', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, pool, schema } = postgres
  const seen = new Map<string, unknown>()
  const echo = defineTask({
    name: 'echo',
    retry: { attempts: 1 },
    handler ({ name, value }: { name: string, value: Json }, { headers, requestId }) {
      seen.set(name, { json: JSON.stringify(value), odd: headers['odd'], requestId })
      if (name === 'error') throw Object.assign(new Error('null: \u0000, half: \ud83d'), { code: 'E\u0000' })
      return value
    }
  })
  const addOdd = (message: unknown): void => { Object.assign((message as TaskEnqueueMessage).headers, { odd: 'null: \u0000' }) }
  subscribe('fastify-background-tasks.enqueue', addOdd)
  t.teardown(() => { unsubscribe('fastify-background-tasks.enqueue', addOdd) })
  let id = ''
  const { app } = await start(t, { tasks: [echo], engine: pgBoss({ connectionString, schema }), enqueueTimeout: 5_000 }, { genReqId: () => 'req \ud83d' })
  app.get('/', async request => { id = request.backgroundTasks.addTask(echo, { name: 'request', value: 1 }).id })
  await app.ready()
  const untilState = async (id: string, state: string): Promise<void> => {
    await until(async () => (await app.backgroundTasks.get(echo, id))?.state === state)
  }

  for (const [name, value] of Object.entries(VALUES)) {
    const { id } = await app.backgroundTasks.enqueue(echo, { name, value })
    await untilState(id, 'succeeded')
    t.match(seen.get(name), { json: JSON.stringify(value), odd: 'null: \u0000' }, `${name}: the payload`)
    t.equal(JSON.stringify((await app.backgroundTasks.get(echo, id))?.result), JSON.stringify(value), `${name}: the result`)
  }
  t.equal((await app.inject('/')).statusCode, 200)
  await untilState(id, 'succeeded')
  t.match(seen.get('request'), { requestId: 'req \ud83d' })
  const { id: failed } = await app.backgroundTasks.enqueue(echo, { name: 'error', value: 1 })
  await untilState(failed, 'failed')
  t.match(await app.backgroundTasks.get(echo, failed), { error: { message: 'null: \u0000, half: \ud83d', code: 'E\u0000' } })

  unsubscribe('fastify-background-tasks.enqueue', addOdd)
  const { id: ordinary } = await app.backgroundTasks.enqueue(echo, { name: 'ordinary', value: { subject: 'Hi', to: 'ada' } })
  await untilState(ordinary, 'succeeded')
  const { rows } = await pool.query(`select data->'payload'->'value'->>'to' as to, output->'value'->>'to' as result from ${schema}.job where id = $1`, [ordinary])
  t.strictSame(rows, [{ to: 'ada', result: 'ada' }], 'an ordinary payload, and its result, can be read in the table')
})

t.test('a job by hand may say anything, and a payload that was changed in the table keeps its change', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, pool, schema } = postgres
  const seen: string[] = []
  const note = defineTask({ name: 'note', handler (payload: Json) { seen.push(JSON.stringify(payload)) } })
  const web = await start(t, { tasks: [note], engine: pgBoss({ connectionString, schema }), worker: false, enqueueTimeout: 5_000 })
  await web.app.ready()
  const boss = new PgBoss({ connectionString, schema, supervise: false })
  await boss.start()
  t.teardown(() => boss.stop({ graceful: false }))
  const data = [{ payload: { b: 1 } }, { [MARK]: '7' }, { [MARK]: 'no JSON' }, { payload: { c: 1, d: 1 }, keys: '1,1' }, { payload: { e: 1, f: 1 }, keys: { length: -1 } }, { payload: { g: 1, h: 1 }, keys: '1,0' }]
  for (const each of data) await boss.send('note', each)
  const { id } = await web.app.backgroundTasks.enqueue(note, { zebra: 1, a: { y: 1, x: 2 } })
  await pool.query(`update ${schema}.job set data = jsonb_set(data, '{payload,new}', '"by hand"') where id = $1`, [id])
  const worker = await start(t, { tasks: [note], engine: pgBoss({ connectionString, schema }) })
  await worker.app.ready()
  await until(() => seen.length === 7)
  t.strictSame(seen.sort(), [
    '{"a":{"x":2,"y":1},"new":"by hand","zebra":1}',
    '{"b":1}',
    '{"c":1,"d":1}',
    '{"e":1,"f":1}',
    '{"fastify-background-tasks":"7"}',
    '{"fastify-background-tasks":"no JSON"}',
    '{"h":1,"g":1}'
  ])
})

t.test('the order of keys is known where jsonb would change it', async t => {
  t.equal(keyOrder({ a: 1, b: [{ c: 1, dd: 1 }] }), undefined)
  t.strictSame(keyOrder({ b: 1, a: [{ c: 1 }, { d: 1, c: 1 }] }), '1,0;1,0')
  t.equal(JSON.stringify(inKeyOrder({ a: [{ c: 1 }, { c: 1, d: 1 }], b: 1 }, '1,0;1,0')), '{"b":1,"a":[{"c":1},{"d":1,"c":1}]}')
})

t.test('what jsonb refuses is found without a list of all escapes, which would fill the memory', async t => {
  for (const [text, storable] of [['\u0001\\', true], ['\\u0000', true], ['\\\u0000', false], ['\u0000', false], ['😀', true], ['\ud83d', false], ['\\\ud83d', false], ['\\ude00', true]] as const) {
    t.equal(isStorable(JSON.stringify([text, text])), storable, JSON.stringify(text))
  }
  const before = process.memoryUsage().rss
  t.equal(isStorable(`"${'\\"'.repeat(4e7)}\\u0000"`), false)
  t.ok(process.memoryUsage().rss - before < 500e6, `${Math.round((process.memoryUsage().rss - before) / 1e6)} MB`)
})

t.test('what can never be stored is the error of its own task, and nobody else waits for it', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, pool, schema } = postgres
  const { log } = (await start(t)).app
  const engine = pgBoss({ connectionString, schema })
  const specs = ['odd', 'other'].map(name => ({ name, attempts: 1, timeout: undefined, keep: { succeeded: 60, failed: 60 }, concurrency: 1 }))
  await engine.start(specs, { log, error: error => { t.fail(error.message) }, cancelled () {} })
  t.teardown(() => engine.stop({ drainMs: 0 }))
  const job = (task: string, text = '1'): Job => ({ id: randomUUID(), task, text, payload: 1, delayMs: 0, keyed: false, enqueuedAt: Date.now(), headers: {}, requestId: undefined })

  const refused = { code: 'FST_BGT_INVALID_PAYLOAD', statusCode: 500, message: /^The payload of the task "odd" cannot be stored by PostgreSQL/ }
  await t.rejects(engine.enqueue([job('odd', 'x'.repeat(2 ** 28))]), { ...refused, message: /larger than 256 MB/ })
  await t.rejects(engine.enqueue([job('odd', 'é'.repeat(2 ** 27 + 1))]), { ...refused, message: /larger than 256 MB/ }, 'in bytes')
  // A trigger stands for what only the server knows, such as a number of keys that jsonb has no room for.
  await pool.query(`create function ${schema}.refuse() returns trigger language plpgsql as $$ begin raise exception 'secret' using errcode = '54000'; end $$`)
  await pool.query(`create trigger refuse before insert on ${schema}.job_common for each row when (new.name = 'odd') execute function ${schema}.refuse()`)
  await t.rejects(engine.enqueue([job('other'), job('odd')]), { ...refused, message: /PostgreSQL: the server refused a value \(SQLSTATE 54000\)$/ })
  t.match(await engine.enqueue([job('other')]), [{ duplicate: false }])
  await pool.query(`drop trigger refuse on ${schema}.job_common`)

  const far = { ...job('odd'), delayMs: Number.MAX_VALUE }
  t.match(await engine.enqueue([far]), [{ duplicate: false }], 'a delay of any length')
  t.match(await engine.get('odd', far.id), { state: 'delayed' })

  await pool.query(`delete from ${schema}.job`)
  await pool.query(`delete from ${schema}.queue`)
  t.match(await engine.enqueue([job('other')]), [{ duplicate: false }], 'a queue that somebody has deleted is declared again')
})
