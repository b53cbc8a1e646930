import { randomUUID } from 'node:crypto'
import pg from 'pg'
import { PgBoss, type ConstructorOptions } from 'pg-boss'
import type { Test } from 'tap'
import { opened } from './opened.js'

export interface OpenPostgres {
  readonly connectionString: string
  readonly pool: pg.Pool
  /** Of the test's own: it is gone behind it. */
  readonly schema: string
}

/** The PostgreSQL of the machine, or of `POSTGRES_URL`. */
export async function openPostgres (t: Test): Promise<OpenPostgres | undefined> {
  const connectionString = process.env['POSTGRES_URL'] ?? 'postgres://postgres@127.0.0.1:5432/test'
  const pool = new pg.Pool({ connectionString, connectionTimeoutMillis: 2_000 })
  t.teardown(() => pool.end())
  if (await opened(t, 'PostgreSQL', () => pool.query('select 1')) === undefined) return undefined
  const schema = `fbt_test_${randomUUID().slice(0, 8)}`
  t.teardown(() => pool.query(`drop schema if exists ${schema} cascade`))
  return { connectionString, pool, schema }
}

/** Stores a job as a program does that has pg-boss and nothing of this package. */
export async function sendByHand (options: ConstructorOptions, queue: string, data: object): Promise<void> {
  const boss = new PgBoss({ ...options, schedule: false, supervise: false })
  await boss.start()
  await boss.send(queue, data)
  await boss.stop({ graceful: false })
}
