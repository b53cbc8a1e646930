import { randomUUID } from 'node:crypto'
import t from 'tap'
import { PgBossConsumer } from '../../lib/engines/pg-boss/consumer.js'
import { PgBossServer } from '../../lib/engines/pg-boss/server.js'
import type { TaskSpec } from '../../lib/index.js'
import { start } from '../support/app.js'
import { openPostgres } from '../support/postgres.js'

const CONCURRENCY = 10

t.test('jobs are taken in advance: many that are short and small, few of large payloads, none that may start once', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, schema } = postgres
  const { log } = (await start(t)).app
  const specOf = (name: string, attempts: number): TaskSpec => ({ name, attempts, timeout: undefined, keep: { succeeded: 60, failed: 60 }, concurrency: CONCURRENCY })
  const [many, once] = [specOf('many', 3), specOf('once', 1)]
  const server = new PgBossServer({ connectionString, schema, schedule: false, registerInstance: false }, [many, once], { log, error: error => { t.fail(error.message) }, cancelled () {} })
  await server.open()
  t.teardown(() => server.close())
  let fetched: number[] = []
  const fetch = server.fetch.bind(server)
  server.fetch = async (queue, batchSize) => {
    fetched.push(batchSize)
    return await fetch(queue, batchSize)
  }

  function consume (spec: TaskSpec): (jobs: number, payload: string) => Promise<number> {
    let left = 0
    let done = (): void => {}
    const consumer = new PgBossConsumer(spec, server, async () => {
      if (--left === 0) done()
      return { kind: 'done', result: null }
    }, () => {})
    t.teardown(() => { consumer.close() })
    return async (jobs, payload) => {
      // More large ones in one statement would take longer than it may.
      const perInsert = payload.length > 1 ? 20 : jobs
      for (let stored = 0; stored < jobs; stored += perInsert) {
        await server.insert(spec.name, Array.from({ length: perInsert }, () => ({ id: randomUUID(), data: { payload } })), 2_000)
      }
      left = jobs
      fetched = []
      const ended = new Promise<void>(resolve => { done = resolve })
      consumer.wake()
      await ended
      await consumer.idle()
      return Math.max(...fetched)
    }
  }

  const run = consume(many)
  // So many of this size are 16 Mi.
  const large = 2 ** 24 / 500_000
  const atOnce = await run(200, 'x'.repeat(500_000))
  t.ok(atOnce > CONCURRENCY && atOnce <= CONCURRENCY + large, `${atOnce} large ones at once`)
  await run(1_000, 'x')
  const small = await run(5_000, 'x')
  t.ok(small > CONCURRENCY + 2 * large && small <= CONCURRENCY + 2_000, `${small} small ones at once`)
  t.equal(await consume(once)(200, 'x'), CONCURRENCY, 'the attempt of one that was taken and not started is spent')
})
