/** What this adapter uses of pg-boss that pg-boss does not promise, and the check at the start that it is there. See docs/architecture.md. */
import { type Db, getConstructionPlans } from 'pg-boss'
import type { Pool } from './pool.js'
import { cancelKeeping, fetchAnew, freeingKeys, insertWithin, LOCK_MS, retryAnew } from './texts.js'

/** The version of pg-boss's tables that this adapter was tested with. It is that of pg-boss 12.38. */
const TESTED = 46
const KNOWN = `this package knows pg-boss 12.38, which has version ${TESTED}`

/** Of the table `job`. */
const COLUMNS = ['id', 'name', 'data', 'state', 'blocked', 'retry_limit', 'retry_count', 'start_after', 'created_on', 'started_on', 'completed_on', 'expire_seconds', 'heartbeat_on', 'heartbeat_seconds', 'deletion_seconds', 'output']
const STATES = ['created', 'retry', 'active', 'completed', 'cancelled', 'failed']

/**
 * Checks what can be checked, in one statement.
 * @param queue any queue that is declared
 * @returns a warning, if all is there and the version is a later one than was tested
 * @throws if something is not what this adapter knows, or if the server reads only
 */
export async function checkCoupling (pool: Pool, schema: string, queue: string | undefined): Promise<string | undefined> {
  const installed = installedVersion()
  const { version, columns, states } = await read(pool.boss.getDb(), schema)
  const versions = `the tables of the schema "${schema}" have version ${version}, and the installed pg-boss has version ${installed}`
  if (version > installed || version < TESTED) throw new Error(`${versions}: ${KNOWN}. Install the pg-boss that has made the tables, or a later one`)
  const missing = [
    ...COLUMNS.filter(column => !columns.includes(column)).map(column => `job.${column}`),
    ...STATES.filter(state => !states.includes(state)).map(state => `state ${state}`),
    ...queue === undefined ? [] : await missingTexts(pool, queue)
  ]
  if (missing.length > 0) throw new Error(`pg-boss lacks what this package uses of it (${missing.join(', ')}): ${versions}; ${KNOWN}`)
  return version === TESTED ? undefined : `${versions}: ${KNOWN}. What this package uses is there`
}

/** How many jobs a call of pg-boss has changed. Its types do not say that it tells. */
export function affectedBy (response: object): number {
  return Number((response as { affected?: unknown }).affected)
}

/** The version of the tables that the installed pg-boss makes. Its plan for them says it. */
function installedVersion (): number {
  return Number(/version\s*\(\s*version\s*\)\s*values\s*\('?(\d+)/i.exec(getConstructionPlans())?.[1] ?? Infinity)
}

interface Found {
  readonly version: number
  readonly columns: readonly string[]
  readonly states: readonly string[]
}

async function read (db: Db, schema: string): Promise<Found> {
  const { rows: [row] } = await db.executeSql(`
    SELECT (SELECT max(version)::int FROM ${schema}.version) AS version,
      current_setting('transaction_read_only') AS "readOnly",
      (SELECT string_agg(attname, ' ') FROM pg_catalog.pg_attribute
        WHERE attrelid = to_regclass($1 || '.job') AND attnum > 0 AND NOT attisdropped) AS columns,
      (SELECT string_agg(enumlabel, ' ') FROM pg_catalog.pg_enum WHERE enumtypid = to_regtype($1 || '.job_state')) AS states`, [schema])
  const { version, readOnly, columns, states } = row as { version: unknown, readOnly: unknown, columns: unknown, states: unknown }
  // A standby answers what only reads, and would be found out at the first job.
  if (readOnly === 'on') throw Object.assign(new Error('read-only'), { code: '25006' })
  return { version: Number(version), columns: String(columns).split(' '), states: String(states).split(' ') }
}

/** The statements of pg-boss that this adapter changes, if they are no more as it knows them. Nothing is sent to the server. */
async function missingTexts (pool: Pool, queue: string): Promise<string[]> {
  const missing: string[] = []
  const expecting = (name: string, change: (text: string) => string, rows: unknown[] = []): Db => ({
    async executeSql (text) {
      if (change(text) === text) missing.push(`${name} of a known text`)
      return { rows }
    }
  })
  await pool.boss.fetch(queue, { db: expecting('fetch', fetchAnew) })
  await pool.boss.insert(queue, [], { db: expecting('insert', text => insertWithin(LOCK_MS.keys, text)) })
  await pool.boss.insert(queue, [], { db: expecting('insert of keys', text => freeingKeys(LOCK_MS.keys, text)) })
  const cancelled = await pool.boss.cancel(queue, 'none', { db: expecting('cancel', text => cancelKeeping(1, text), [{ count: 1 }]) })
  const retried = await pool.boss.retry(queue, 'none', { db: expecting('retry', retryAnew, [{ count: 1 }]) })
  if (affectedBy(cancelled) !== 1 || affectedBy(retried) !== 1) missing.push('the number of affected jobs')
  return missing
}
