import { randomUUID } from 'node:crypto'
import pg from 'pg'
import { pgBoss } from '../../lib/engines/pg-boss.js'
import { conformance, opened } from './suite.js'

const connectionString = process.env['POSTGRES_URL'] ?? 'postgres://postgres@127.0.0.1:5432/test'

conformance(async t => {
  const pool = new pg.Pool({ connectionString, connectionTimeoutMillis: 2_000 })
  t.teardown(() => pool.end())
  if (await opened(t, 'PostgreSQL', () => pool.query('select 1')) === undefined) return undefined
  const schema = `fbt_test_${randomUUID().slice(0, 8)}`
  return {
    name: 'pg-boss',
    engine: () => pgBoss({ connectionString, schema }),
    supports: { delay: true, key: true, tx: true, get: true },
    cleanUp: () => pool.query(`drop schema if exists ${schema} cascade`)
  }
})
