/** What an operator asks of the jobs of a queue. */
import type { Db } from 'pg-boss'
import type { JobCounts, JobQuery, JobRecord, TaskSpec } from '../engine.js'
import { affectedBy } from './coupling.js'
import { payloadOf, type StoredJob, toRecord } from './jobs.js'
import { count, page, pageStart } from './records.js'
import type { PgBossServer } from './server.js'
import { keepTimes } from './statements.js'
import { cancelKeeping, retryAnew } from './texts.js'

/** A message on pg-boss's channel that a job was cancelled. No queue has a space in its name. */
export const CANCELLED = 'cancelled'

interface Found extends StoredJob {
  readonly addedAt: number
  readonly data?: unknown
}

/** Whether pg-boss may have a job of this id. The server would refuse any other, and quote it. */
export function isJobId (id: string): boolean {
  return /^[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(id)
}

export async function countJobs (server: PgBossServer, { name, keep }: TaskSpec): Promise<JobCounts> {
  const [row] = await server.ask(count(server.schema), [name, Date.now(), keepTimes(keep).failed])
  return row as JobCounts
}

export async function findRecords (server: PgBossServer, { name, attempts }: TaskSpec, { state, limit, after, payload }: JobQuery): Promise<JobRecord[]> {
  if (state === 'abandoned') return []
  const now = Date.now()
  // Anybody may have made the position.
  const position = after === undefined ? [] : [after.enqueuedAt, after.id.replaceAll('\0', '')]
  const query = { state, isNext: after !== undefined }
  const values = [name, now, limit, ...position]
  const [first] = await server.ask(pageStart(server.schema, query), values) as Array<{ since: number }>
  let rows: Found[] = []
  if (first !== undefined) rows = await server.ask(page(server.schema, query, true, payload), [...values, first.since]) as Found[]
  // Jobs that were looked at may have gone on since.
  if (rows.length < limit) rows = await server.ask(page(server.schema, query, false, payload), values) as Found[]
  return rows.map(row => ({
    ...toRecord(name, attempts, row, row.addedAt, now),
    ...(payload && { payload: payloadOf(name, row.id, row.data) })
  }))
}

/** @returns whether the job had failed for good */
export async function retryJob (server: PgBossServer, queue: string, id: string): Promise<boolean> {
  const db = changing(server, retryAnew, queue, id)
  const affected = affectedBy(await server.web.ask(boss => boss.retry(queue, id, { db })))
  // A worker that does not hear of it finds the job when it polls.
  if (affected > 0) void server.notify(server.channel, [queue]).catch(() => {})
  return affected > 0
}

/** @returns whether the job had not ended */
export async function cancelJob (server: PgBossServer, { name, keep }: TaskSpec, id: string): Promise<boolean> {
  const { failed } = keepTimes(keep)
  const db = changing(server, text => cancelKeeping(failed, text), name, id)
  const affected = affectedBy(await server.web.ask(boss => boss.cancel(name, id, { db })))
  if (affected === 0) return false
  // A worker that does not hear of it finds out by its next sign of life.
  void server.notify(server.channel, [`${CANCELLED} ${name} ${id}`]).catch(() => {})
  void server.notify(server.endsChannel, [`${name} ${id}`]).catch(() => {})
  return true
}

/** Runs a statement of pg-boss for one job, changed. Executors differ in how they pass arrays, and the changed statement takes the text of one. */
function changing (server: PgBossServer, change: (text: string) => string, queue: string, id: string): Db {
  return { executeSql: async text => await server.web.db.executeSql(change(text), [queue, `{${id}}`]) }
}
