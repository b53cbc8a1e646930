/**
 * Statements on the tables of pg-boss, for what pg-boss 12.38 has no call. They use columns that its documentation describes, and leave a
 * job as the calls of pg-boss would.
 */
import type { TaskSpec } from '../engine.js'
import { ENDED_LIMIT, limitingLocks, LOCK_MS, RETRY_LIMIT } from './texts.js'

/** Seconds without a sign of life after which a job's process may be dead. */
const LOST_SECONDS = 10

/** A verdict, as the statement of `settle` takes it. */
export interface Settlement {
  readonly id: string
  /** The mark of the start that is settled. */
  readonly start: number
  readonly state: 'created' | 'retry' | 'completed' | 'cancelled' | 'failed'
  /** A result or an error. If undefined, what is stored stays. */
  readonly output?: unknown
  /** Milliseconds until the job may start again. */
  readonly delay?: number
  /** Seconds for which the record of an ended job is kept. */
  readonly keep?: number
  /** The attempt does not count. */
  readonly uncounted?: true
}

/** A start of a job, which this process has fetched. */
export interface Start {
  readonly name: string
  readonly id: string
  /** Its mark, see `fetchAnew`. */
  readonly start: number
}

/** Seconds as `deletion_seconds` takes them: an integer, of which 0 would mean for ever. */
export function keepTimes ({ succeeded, failed }: TaskSpec['keep']): TaskSpec['keep'] {
  const seconds = (value: number): number => Math.min(Math.max(Math.ceil(value), 1), 2 ** 31 - 1)
  return { succeeded: seconds(succeeded), failed: seconds(failed) }
}

/**
 * Ends jobs, or returns them to their queue, each in its own way and all in one call. pg-boss's `complete` stores one result for all jobs,
 * its `fail` decides itself whether and when a job is retried, in whole seconds, and both know one time to keep a record.
 *
 * A job that was started again since, cancelled or put back, is left alone. A job that counted as lost, and has not been started since, is settled.
 *
 * The list of states, and `::text`, make the planner expect few rows and look each one up by its key. In a table that was not analysed
 * lately it would read every job that waits.
 *
 * Values: queue, JSON of an array of `Settlement`. Rows: the ids of the jobs that were settled, if `skipsLocked`.
 * @param skipsLocked leaves out jobs that another transaction holds. Otherwise the statement waits for them, and fails if it waits too long
 */
export function settle (schema: string, skipsLocked: boolean): string {
  return `
    WITH verdict AS (
      SELECT * FROM json_to_recordset(${limitingLocks('$2', LOCK_MS.settlement)}::json)
        AS x (id uuid, start int, state text, output jsonb, delay float8, keep int, uncounted bool)
      WHERE state IN ('created', 'retry', 'completed', 'cancelled', 'failed')
    )
    UPDATE ${schema}.job j SET
      state = v.state::${schema}.job_state,
      output = CASE WHEN v.uncounted THEN j.output ELSE v.output END,
      completed_on = CASE WHEN v.keep IS NULL THEN NULL ELSE now() END,
      retry_limit = CASE WHEN v.keep IS NULL THEN j.retry_limit ELSE ${ENDED_LIMIT} END,
      deletion_seconds = COALESCE(v.keep, j.deletion_seconds),
      start_after = CASE WHEN v.delay IS NULL THEN j.start_after ELSE now() + v.delay * interval '1 ms' END,
      started_on = CASE WHEN v.uncounted THEN NULL ELSE j.started_on END,
      heartbeat_on = NULL
    FROM verdict v
    WHERE j.name = $1 AND j.id = v.id AND j.expire_seconds = v.start
      AND j.state::text IN ('active', 'retry') AND j.retry_limit <= ${RETRY_LIMIT}${skipsLocked
        ? `
      AND j.id IN (SELECT l.id FROM ${schema}.job l JOIN verdict ON l.id = verdict.id WHERE l.name = $1 FOR UPDATE OF l SKIP LOCKED)
    RETURNING j.id`
        : ''}`
}

/**
 * Shows signs of life of jobs. A job that another transaction holds is left out, so that the others do not wait for it: nobody takes a job
 * that is held. Value: JSON of an array of `Start`. Rows: the ids of the jobs that were touched.
 */
export function touch (schema: string): string {
  return `
    WITH mine AS (
      SELECT j.name, j.id
      FROM json_to_recordset($1::text::json) AS x (name text, id uuid, start int)
      JOIN ${schema}.job j ON j.name = x.name AND j.id = x.id AND j.expire_seconds = x.start AND j.state::text IN ('active')
      FOR UPDATE OF j SKIP LOCKED
    )
    UPDATE ${schema}.job j SET heartbeat_on = now() FROM mine WHERE j.name = mine.name AND j.id = mine.id RETURNING j.id`
}

/**
 * What the server knows of jobs that this process runs. Value: JSON of an array of `Start`. Rows: a `Fate` for each job that is there.
 */
export function fates (schema: string): string {
  return `
    SELECT j.name, j.id, j.expire_seconds AS start, j.state::text AS state, j.data->'enqueuedAt' AS "enqueuedAt",
      (j.state = 'created' OR (j.state = 'retry' AND j.retry_limit > ${RETRY_LIMIT})) AS "isPutBack"
    FROM json_to_recordset($1::text::json) AS x (name text, id uuid)
    JOIN ${schema}.job j ON j.name = x.name AND j.id = x.id`
}

/** What has become of a job that this process runs. The start is its last one. */
export interface Fate extends Start {
  readonly state: string
  /** Whether it waits for its first attempt. */
  readonly isPutBack: boolean
  /** When the task was added that is stored under this id now. */
  readonly enqueuedAt: unknown
}

/**
 * Runs before a fetch, in the same transaction. In a table that was not analysed lately, the planner reads and sorts all jobs that wait to
 * take the first few: with 20,000 waiting jobs that took 12 ms, where following the index takes 1 ms.
 */
export const IN_INDEX_ORDER = 'SELECT set_config(\'enable_sort\', \'off\', true), set_config(\'enable_bitmapscan\', \'off\', true)'

/**
 * Finds jobs without a sign of life, and returns to their queues those of them that were found before. A process whose job was held by
 * another transaction has time to touch it in between. pg-boss would return them when it supervises, at the first sight. Values: array of
 * queues, array of ids that were found before. Rows: the ids and whether the job was returned.
 */
export function reclaim (schema: string): string {
  return `
    WITH lost AS (
      SELECT name, id FROM ${schema}.job
      WHERE name = ANY($1::text[]) AND state = 'active' AND COALESCE(heartbeat_on, started_on) + interval '${LOST_SECONDS} s' < now()
      FOR UPDATE SKIP LOCKED
    ), returned AS (
      UPDATE ${schema}.job j SET state = 'retry', start_after = now(), heartbeat_on = NULL, output = NULL
      FROM lost WHERE j.name = lost.name AND j.id = lost.id AND j.id = ANY($2::uuid[])
    )
    SELECT id, id = ANY($2::uuid[]) AS returned FROM lost`
}

/** When the first waiting job of each queue may start, and milliseconds until then. A queue without waiting jobs has no row. Value: array of queues. */
export function nextDue (schema: string): string {
  const first = (state: string): string =>
    `(SELECT min(j.start_after) FROM ${schema}.job j WHERE j.name = q.name AND j.state = '${state}' AND NOT j.blocked)`
  return `
    SELECT name, extract(epoch FROM due)::float8 AS at, ceil(extract(epoch FROM due - now()) * 1000)::float8 AS ms
    FROM (SELECT q.name, LEAST(${first('created')}, ${first('retry')}) AS due FROM unnest($1::text[]) AS q (name)) AS queues
    WHERE due IS NOT NULL`
}

/** Tells something to other processes. Values: channel, array of messages. */
export const NOTIFY = 'SELECT pg_notify($1, message) FROM unnest($2::text[]) AS messages (message)'
