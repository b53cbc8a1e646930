/**
 * What happens to jobs on PostgreSQL when its server is in trouble (`npm run chaos`): pg-boss by hand, and the plugin, each on a server that
 * this program starts and removes. Every job that was accepted has to run. It takes four minutes.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import pg from 'pg'
import { PgBoss } from 'pg-boss'
import backgroundTasks, { defineTask } from '../lib/index.js'
import { pgBoss } from '../lib/engines/pg-boss/index.js'
import { postgresServer, type TestServer } from '../test/support/servers.js'
import { printHeading, printRow } from './report.js'

const CLIENTS = 20
/** By hand, 100,000 take longer than all else here. */
const JOBS = 20_000

/** One way to store and to run jobs. */
interface Side {
  /** Rejects if the job is not known to be stored. */
  store: (n: number) => Promise<unknown>
  stop: () => Promise<void>
}
type Open = (url: string, run: (n: number) => void) => Promise<Side>

const sides: Record<string, Open> = {
  async 'by hand' (connectionString, run) {
    const boss = new PgBoss({ connectionString, schedule: false, superviseIntervalSeconds: 5 })
    boss.on('error', () => {})
    await boss.start()
    await boss.createQueue('work', { notify: true, retryLimit: 10, heartbeatSeconds: 10 })
    await boss.work<{ n: number }>('work', { batchSize: 1_000, localConcurrency: 2, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true }, async jobs => {
      for (const { data } of jobs) run(data.n)
    })
    return { store: n => boss.send('work', { n }), stop: () => boss.stop({ graceful: true, timeout: 5_000 }) }
  },
  async 'the plugin' (connectionString, run) {
    const app = Fastify()
    const work = defineTask({ name: 'work', retry: { attempts: 11 }, handler: run })
    await app.register(backgroundTasks, { tasks: [work], engine: pgBoss({ connectionString }), worker: { concurrency: 50 } })
    await app.ready()
    return { store: n => app.backgroundTasks.enqueue(work, n), stop: () => app.close() }
  }
}

class Run {
  readonly accepted = new Set<number>()
  readonly starts = new Map<number, number>()
  refused = 0
  /** What was accepted and has not started. */
  readonly #waiting = new Set<number>()
  #next = 0
  #acceptedAt = 0
  #isOver = false
  #clients: Promise<unknown> | undefined
  side!: Side

  readonly ran = (n: number): void => {
    this.starts.set(n, (this.starts.get(n) ?? 0) + 1)
    this.#waiting.delete(n)
  }

  async store (): Promise<void> {
    const n = this.#next++
    try {
      await this.side.store(n)
      this.accepted.add(n)
      if (!this.starts.has(n)) this.#waiting.add(n)
      this.#acceptedAt = performance.now()
    } catch {
      this.refused++
      await sleep(20)
    }
  }

  load (pauseMs: number): void {
    this.#clients = Promise.all(Array.from({ length: CLIENTS }, async () => {
      while (!this.#isOver) {
        await this.store()
        if (pauseMs > 0) await sleep(pauseMs)
      }
    }))
  }

  async end (): Promise<void> {
    this.#isOver = true
    await this.#clients
  }

  /** Milliseconds until a job is accepted that was stored after now. */
  async recovery (): Promise<number> {
    const from = performance.now()
    while (this.#acceptedAt < from + 100) await sleep(5)
    return this.#acceptedAt - from
  }

  /** Waits until everything that was accepted has run, a minute at most. */
  async drained (): Promise<number> {
    const from = performance.now()
    while (this.lost > 0 && performance.now() - from < 60_000) await sleep(20)
    return performance.now() - from
  }

  get lost (): number {
    return this.#waiting.size
  }

  get doubled (): number {
    return Array.from(this.starts.values()).filter(times => times > 1).length
  }
}

type Admin = (text: string) => Promise<Record<string, unknown>[]>
type Scenario = (run: Run, server: TestServer, admin: Admin) => Promise<string>

const scenarios: Record<string, Scenario> = {
  async 'all backends are killed' (run, _server, admin) {
    run.load(2)
    await sleep(2_000)
    await admin('select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid() and backend_type = \'client backend\'')
    const ms = await run.recovery()
    await sleep(1_000)
    return `accepted again after ${ms.toFixed(0)} ms`
  },
  async 'the server restarts' (run, server) {
    run.load(2)
    await sleep(2_000)
    await server.stop()
    await server.start()
    const ms = await run.recovery()
    await sleep(1_000)
    return `accepted again ${ms.toFixed(0)} ms after the start`
  },
  'a transaction is idle for 15 s': async (run, server) => await disturbed(run, server, client => client.query('begin isolation level repeatable read; select count(*) from pgboss.job')),
  'a long reader for 15 s': async (run, server) => await disturbed(run, server, client => client.query('select count(*), pg_sleep(15) from pgboss.job')),
  async 'for 10 s, 1.5 times the load that drains' (run) {
    // What 20 clients store and the worker runs in 3 s, and then half as much again from the side.
    run.load(0)
    await sleep(3_000)
    const rate = run.starts.size / 3
    const until = performance.now() + 10_000
    while (performance.now() < until) {
      await Promise.all(Array.from({ length: Math.max(1, Math.round(rate / 40)) }, () => run.store()))
      await sleep(50)
    }
    await run.end()
    return `${run.accepted.size} accepted, the rest ran within ${(await run.drained()).toFixed(0)} ms`
  },
  async [`after ${JOBS} jobs`] (run, _server, admin) {
    const from = performance.now()
    while (run.accepted.size < JOBS) await Promise.all(Array.from({ length: 500 }, () => run.store()))
    await run.drained()
    const seconds = (performance.now() - from) / 1_000
    await sleep(2_000)
    const [row] = await admin('select n_dead_tup as dead, pg_size_pretty(pg_total_relation_size(relid)) as size from pg_stat_user_tables where relname = \'job_common\'')
    return `${seconds.toFixed(0)} s, ${String(row?.['dead'])} dead tuples, ${String(row?.['size'])} with its indexes`
  }
}

/** Jobs per second in the first and in the last 3 of 15 s. */
async function disturbed (run: Run, server: TestServer, disturb: (client: pg.Client) => Promise<unknown>): Promise<string> {
  const client = new pg.Client(server.url)
  await client.connect()
  run.load(0)
  await sleep(1_000)
  disturb(client).catch(() => {})
  const rates: number[] = []
  for (let i = 0; i < 5; i++) {
    const before = run.starts.size
    await sleep(3_000)
    rates.push((run.starts.size - before) / 3)
  }
  await client.end()
  return `${(rates[0] ?? NaN).toFixed(0)} jobs/s at its begin, ${(rates.at(-1) ?? NaN).toFixed(0)} at its end`
}

printHeading('pg-boss in trouble')
let isLost = false
for (const [what, scenario] of Object.entries(scenarios)) {
  for (const [name, open] of Object.entries(sides)) {
    const server = await postgresServer()
    await server.start()
    const admin: Admin = async text => {
      const client = new pg.Client(server.url)
      await client.connect()
      const { rows } = await client.query<Record<string, unknown>>(text)
      await client.end()
      return rows
    }
    try {
      while (!await admin('select 1').then(() => true, () => false)) await sleep(50)
      const run = new Run()
      run.side = await open(server.url, run.ran)
      const result = await scenario(run, server, admin)
      await run.end()
      await run.drained()
      const { accepted: { size }, refused, lost, doubled } = run
      isLost ||= lost > 0 && name === 'the plugin'
      printRow({ what: `${what}, ${name}`, figure: `${result}; ${size} accepted, ${refused} refused, ${lost} lost, ${doubled} doubled`, ...name === 'the plugin' && { limit: '0 lost', met: lost === 0 } })
      await run.side.stop()
    } finally {
      await server.remove()
    }
  }
}
process.exit(isLost ? 1 : 0)
