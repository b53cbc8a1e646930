/**
 * Statements of pg-boss that this adapter runs, changed in one place each. pg-boss has no option for it. A statement of an unknown text is
 * run as it is.
 */

/** Retries that a job has for pg-boss. The core decides about retries, and pg-boss never fails a job by itself. */
export const RETRY_LIMIT = 1_000_000_000
/** The limit of a job that has ended. pg-boss's own `retry` adds one to it. */
export const ENDED_LIMIT = RETRY_LIMIT + 1
/** Seconds after which pg-boss itself ends a job that runs: 31 years. A job may run as long as its process shows signs of life. */
const EXPIRE_SECONDS = 1_000_000_000

/**
 * Milliseconds that a statement waits for a lock that another transaction holds. An insert without keys waits longer: it meets only locks that
 * each insert meets, such as the one under which all transactions of a server commit that notify somebody.
 */
export const LOCK_MS = { settlement: 200, keys: 200, oneKey: 300, noKey: 2_000, operation: 500 }

/**
 * A parameter, as an expression that also limits how long the statement waits for locks: for those of rows, and of keys that another
 * transaction has stored and not committed. The limit ends with the transaction, so a pooler may give the connection to anybody afterwards.
 */
export function limitingLocks (parameter: string, ms: number): string {
  return `(CASE WHEN set_config('lock_timeout', '${ms}', true) <> '' THEN ${parameter}::text END)`
}

type Change = (text: string) => string

const inserts = new Map<string, Change>()

/**
 * How pg-boss's insert is changed: it waits for each lock only so long, and first frees keys, see {@link freeingKeys}.
 * @param ms milliseconds to wait for locks. Undefined in a transaction of the caller, which the limit would outlive
 */
export function insertChange (ms: number | undefined, freesKeys: boolean): Change {
  const name = `${ms} ${freesKeys}`
  let change = inserts.get(name)
  if (change === undefined) {
    change = remembered(text => insertWithin(ms, freesKeys ? freeingKeys(ms, text) : text))
    inserts.set(name, change)
  }
  return change
}

/** pg-boss's insert, which waits for each lock only so long. */
export function insertWithin (ms: number | undefined, text: string): string {
  return ms === undefined ? text : text.replace('$1::text', limitingLocks('$1', ms))
}

/**
 * pg-boss's insert, which first deletes the records of cancelled jobs of the same ids. A second value has these ids, as the text of an array.
 * Both are one statement: of two processes that store one key, one deletes the record and stores its job, and the other finds that job.
 */
export function freeingKeys (ms: number | undefined, text: string): string {
  const [, table, queue] = /INSERT INTO (\S+)[^]*?COALESCE\(id, gen_random_uuid\(\)\) as id,\s*('[^']+') as name/.exec(text) ?? []
  if (table === undefined || queue === undefined) return text
  const ids = ms === undefined ? '$2::text' : limitingLocks('$2', ms)
  // The list of states makes the planner look each job up by its key, see `settle`.
  const freed = `WITH freed AS (
      DELETE FROM ${table} old USING unnest(${ids}::uuid[]) AS new (id)
      WHERE old.name = ${queue} AND old.id = new.id AND old.state::text IN ('cancelled')
      RETURNING old.id
    )`
  return replaced(text, [
    // The insert reads what was deleted, and so comes after it.
    ['ON CONFLICT DO NOTHING', 'WHERE (SELECT count(*) FROM freed) >= 0\n    ON CONFLICT DO NOTHING'],
    [/^\s*(?:WITH ins AS|(?=INSERT))/, found => found.includes('WITH') ? `${freed}, ins AS` : `${freed} `]
  ])
}

/**
 * pg-boss's cancel, which keeps the record as long as that of a failed job, and marks the job as ended. A job that a person had put back, and
 * that has not started since, has no attempts.
 * @param keep seconds
 */
export function cancelKeeping (keep: number, text: string): string {
  const isNew = `state = 'created' OR (state = 'retry' AND retry_limit > ${RETRY_LIMIT})`
  return replaced(text, [
    [/state = 'cancelled'(?=\s+WHERE)/, `state = 'cancelled',
        retry_limit = ${ENDED_LIMIT}, deletion_seconds = ${keep}, heartbeat_on = NULL, output = NULL,
        retry_count = CASE WHEN ${isNew} THEN 0 ELSE retry_count END,
        started_on = CASE WHEN ${isNew} THEN NULL ELSE started_on END`],
    ['$2::uuid[]', `${limitingLocks('$2', LOCK_MS.operation)}::uuid[]`]
  ])
}

/** pg-boss's retry, after which a job starts with its first attempt, whoever has stored it or failed it. */
export function retryAnew (text: string): string {
  return replaced(text, [
    ['retry_limit = retry_limit + 1', `retry_limit = ${ENDED_LIMIT}`],
    ['$2::uuid[]', `${limitingLocks('$2', LOCK_MS.operation)}::uuid[]`]
  ])
}

/**
 * pg-boss's fetch, in which a job that a person has put back starts again with its first attempt. Jobs that have ended are marked by their
 * limit of retries. A job that somebody cancelled and resumed is `created` again, as no other job is that has started. A job that another
 * program has stored may have limits of its own, at which pg-boss would end it while it runs, or start it once more.
 *
 * Each start has a mark, which is a random number of seconds above the limit of 31 years, and which pg-boss's fetch returns as `expireInSeconds`.
 * The number of the attempt does not tell two starts apart when a job was cancelled and put back, or its key was stored again.
 */
export function fetchAnew (text: string): string {
  return text.replace(/retry_count = CASE WHEN (started_on IS NOT NULL)/, `completed_on = NULL,
        retry_limit = ${RETRY_LIMIT}, expire_seconds = ${EXPIRE_SECONDS} + floor(random() * ${EXPIRE_SECONDS})::int, heartbeat_seconds = ${EXPIRE_SECONDS},
        retry_count = CASE WHEN state = 'created' OR retry_limit > ${RETRY_LIMIT} THEN 0 WHEN $1`)
}

/** A text in which all of this was replaced, or the text as it is if one of the patterns is not there. */
function replaced (text: string, changes: ReadonlyArray<readonly [string | RegExp, string | Change]>): string {
  let result = text
  for (const [pattern, by] of changes) {
    const next = result.replace(pattern, typeof by === 'string' ? () => by : by)
    if (next === result) return text
    result = next
  }
  return result
}

/** Remembers what was made of each text. There are a few for each queue. */
function remembered (change: Change): Change {
  const known = new Map<string, string>()
  return text => {
    let changed = known.get(text)
    if (changed === undefined) {
      changed = change(text)
      known.set(text, changed)
    }
    return changed
  }
}
