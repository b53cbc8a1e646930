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

/**
 * Counts the jobs of a queue, those that wait, run or have failed by an index alone. A record whose time is over counts until pg-boss has deleted it
 * only if it was to be kept for less than the definition says now. Values: queue, time, seconds for which a failed job is kept. One row: `JobCounts`.
 */
export function count (schema: string): string {
  const of = (condition: string): string => `(SELECT count(*) FROM ${schema}.job WHERE name = $1 AND ${condition})::int`
  return `
    SELECT ${of(`state = 'created' AND NOT ${IS_LATER}`)} + retry.pending AS pending,
      ${of(`state = 'created' AND ${IS_LATER}`)} + retry.delayed AS delayed,
      ${of('state = \'active\'')} AS running,
      retry.retrying,
      ${of('state = \'failed\'')} - ${of(`state = 'failed' AND completed_on < now() - $3::float8 * interval '1 s' AND NOT (${IS_KEPT})`)} AS failed
    FROM (
      SELECT (count(*) FILTER (WHERE ${IS_NEW} AND NOT ${IS_LATER}))::int AS pending,
        (count(*) FILTER (WHERE ${IS_NEW} AND ${IS_LATER}))::int AS delayed,
        (count(*) FILTER (WHERE NOT ${IS_NEW}))::int AS retrying
      FROM ${schema}.job WHERE name = $1 AND state = 'retry'
    ) AS retry`
}

export interface PageQuery {
  readonly state: Exclude<JobState, 'abandoned'>
  /** Whether the page begins behind a record. */
  readonly isNext: boolean
}

/** The jobs of a page and of all that follow. A value that a statement does not use has no type. */
function which ({ state, isNext }: PageQuery): string {
  return `name = $1 AND $2::float8 IS NOT NULL AND ${WHICH[state]}${isNext ? ` AND (${ADDED_AT}, id::text COLLATE "C") < ($4::float8, $5::text)` : ''}`
}

/**
 * How early the jobs of a page can have been stored. No index has the order of a page, which is that of `addedAt`. But a task was added before
 * it was stored, and an index has the times when jobs were stored: those that were stored last are looked at.
 *
 * Values: queue, time, the most records, and if `isNext` the time and the id of the record before. Rows: one with `since`, or none.
 */
export function pageStart (schema: string, query: PageQuery): string {
  return `
    SELECT added AS since FROM (
      SELECT ${ADDED_AT} AS added FROM ${schema}.job
      WHERE ${which(query)}${query.isNext ? ` AND created_on < ${timeAt('$4::float8 + 1')}` : ''}
      ORDER BY created_on DESC LIMIT $3::int * 2 + 100
    ) AS newest
    ORDER BY added DESC OFFSET $3::int - 1 LIMIT 1`
}

/**
 * Reads a page of records, or what there is of it among the jobs that were stored since a time. Values: those of `pageStart`, and last `since`,
 * if there is one. Rows: `StoredJob` with `addedAt`, and with `data` if it is asked for.
 */
export function page (schema: string, query: PageQuery, hasSince: boolean, hasData: boolean): string {
  const since = query.isNext ? '$6::float8' : '$4::float8'
  return `
    WITH page AS (
      SELECT id, ${ADDED_AT} AS added FROM ${schema}.job
      WHERE ${which(query)}${hasSince ? ` AND created_on >= ${timeAt(since)}` : ''}
      ORDER BY 2 DESC, 1 DESC LIMIT $3::int
    )
    SELECT j.id, j.state, j.retry_count AS "retryCount", j.retry_limit AS "retryLimit", j.start_after AS "startAfter",
      j.started_on AS "startedOn", j.completed_on AS "completedOn", j.created_on AS "createdOn", j.output, page.added AS "addedAt"${hasData ? ', j.data' : ''}
    FROM page JOIN ${schema}.job j ON j.name = $1 AND j.id = page.id
    ORDER BY page.added DESC, j.id DESC`
}
