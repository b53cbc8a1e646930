import { randomUUID } from 'node:crypto'
import pg from 'pg'
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
