/**
 * Statements that read the records of a queue. pg-boss can count the jobs of a queue as they were within the last minute, and can list them in
 * the order in which they were stored, whatever their state is.
 */
import type { JobState } from '../engine.js'
import { RETRY_LIMIT } from './texts.js'
import { MARK } from './values.js'

/** `addedAt` of a job, as the server says it. */
const ADDED_AT = `LEAST(
      CASE WHEN jsonb_typeof(data->'enqueuedAt') = 'number' AND (data ? 'payload' OR jsonb_typeof(data->'${MARK}') = 'string')
        THEN CASE WHEN abs((data->'enqueuedAt')::numeric) <= 8.64e15 THEN trunc((data->'enqueuedAt')::numeric)::bigint::float8 END END,
      floor(date_part('epoch', created_on) * 1000 + 0.0005))`

/** Milliseconds since the epoch as a time of the server, which knows none of before 4714 BC. */
function timeAt (ms: string): string {
  return `to_timestamp(LEAST(GREATEST(${ms}, 0), 8.64e15) / 1000)`
}

/** Whether the record of a job that has ended is still kept. pg-boss looks from time to time for those that are not. */
const IS_KEPT = 'NOT (deletion_seconds > 0 AND COALESCE(completed_on + deletion_seconds * interval \'1 s\' < now(), false))'
/** Whether a job that waits has had no attempt, or was put back. Those of the state `created` never had one. */
const IS_NEW = `(retry_limit > ${RETRY_LIMIT} OR (retry_count = 0 AND started_on IS NULL))`
/** Whether a job has to wait. Value: the time of the app, by which `toRecord` tells it too. Times of a record are whole milliseconds. */
const IS_LATER = 'start_after >= to_timestamp(($2::float8 + 1) / 1000)'

/** Which jobs are in which state. None is `abandoned`. */
const WHICH: Record<Exclude<JobState, 'abandoned'>, string> = {
  pending: `(state = 'created' OR (state = 'retry' AND ${IS_NEW})) AND NOT ${IS_LATER}`,
  delayed: `(state = 'created' OR (state = 'retry' AND ${IS_NEW})) AND ${IS_LATER}`,
  running: 'state = \'active\'',
  retrying: `state = 'retry' AND NOT ${IS_NEW}`,
  succeeded: `state = 'completed' AND ${IS_KEPT}`,
  failed: `state = 'failed' AND ${IS_KEPT}`,
  skipped: `state = 'cancelled' AND ${IS_KEPT}`
}

/** Counts the jobs of a queue. Each part but the last two is answered by an index alone. Values: queue, time. One row: `JobCounts`. */
export function count (schema: string): string {
  const of = (condition: string): string => `(SELECT count(*) FROM ${schema}.job WHERE name = $1 AND ${condition})::int`
  return `
    SELECT ${of(`state = 'created' AND NOT ${IS_LATER}`)} + retry.pending AS pending,
      ${of(`state = 'created' AND ${IS_LATER}`)} + retry.delayed AS delayed,
      ${of('state = \'active\'')} AS running,
      retry.retrying,
      ${of(WHICH.failed)} AS failed
    FROM (
      SELECT (count(*) FILTER (WHERE ${IS_NEW} AND NOT ${IS_LATER}))::int AS pending,
        (count(*) FILTER (WHERE ${IS_NEW} AND ${IS_LATER}))::int AS delayed,
        (count(*) FILTER (WHERE NOT ${IS_NEW}))::int AS retrying
      FROM ${schema}.job WHERE name = $1 AND state = 'retry'
    ) AS retry`
}

/**
 * Reads a page of records. No index has their order, which is that of `addedAt`. But a task was added before it was stored, and an index has the
 * times when jobs were stored. So a page of those that were stored last tells how early a job of the page can have been stored.
 *
 * Values: queue, time, the most records, and if `isNext` the time and the id of the record before. Rows: `StoredJob` with `addedAt`, and `data`
 * if it is asked for.
 */
export function page (schema: string, state: Exclude<JobState, 'abandoned'>, isNext: boolean, hasData: boolean): string {
  // A value that a statement does not use has no type.
  const which = `name = $1 AND $2::float8 IS NOT NULL AND ${WHICH[state]}${isNext ? ` AND (${ADDED_AT} < $4::float8 OR (${ADDED_AT} = $4::float8 AND id::text COLLATE "C" < $5))` : ''}`
  return `
    WITH newest AS (
      SELECT ${ADDED_AT} AS added FROM ${schema}.job
      WHERE ${which}${isNext ? ` AND created_on < ${timeAt('$4::float8 + 1')}` : ''}
      ORDER BY created_on DESC LIMIT $3::int * 2 + 100
    ), page AS (
      SELECT id, ${ADDED_AT} AS added FROM ${schema}.job
      WHERE ${which}
        AND created_on >= COALESCE((SELECT ${timeAt('added')} FROM newest ORDER BY added DESC OFFSET $3::int - 1 LIMIT 1), '-infinity')
      ORDER BY 2 DESC, 1 DESC LIMIT $3::int
    )
    SELECT j.id, j.state, j.retry_count AS "retryCount", j.retry_limit AS "retryLimit", j.start_after AS "startAfter",
      j.started_on AS "startedOn", j.completed_on AS "completedOn", j.created_on AS "createdOn", j.output, page.added AS "addedAt"${hasData ? ', j.data' : ''}
    FROM page JOIN ${schema}.job j ON j.name = $1 AND j.id = page.id
    ORDER BY page.added DESC, j.id DESC`
}
