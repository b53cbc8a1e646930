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
export const LOCK_MS = { settlement: 200, keys: 200, oneKey: 300, noKey: 2_000 }

/**
 * A parameter, as an expression that also limits how long the statement waits for locks: for those of rows, and of keys that another
 * transaction has stored and not committed. The limit ends with the transaction, so a pooler may give the connection to anybody afterwards.
 */
export function limitingLocks (parameter: string, ms: number): string {
  return `(CASE WHEN set_config('lock_timeout', '${ms}', true) <> '' THEN ${parameter}::text END)`
}

const inserts = new Map<number, (text: string) => string>()

/** pg-boss's insert, which waits for each lock only so long. */
export function insertWithin (ms: number, text: string): string {
  let change = inserts.get(ms)
  if (change === undefined) {
    change = remembered(text => text.replace('$1::text', limitingLocks('$1', ms)))
    inserts.set(ms, change)
  }
  return change(text)
}

/**
 * pg-boss's fetch, in which a job that a person has put back starts again with its first attempt. Jobs that have ended are marked by their
 * limit of retries. A job that somebody cancelled and resumed is `created` again, as no other job is that has started. A job that another
 * program has stored may have limits of its own, at which pg-boss would end it while it runs, or start it once more.
 */
export function fetchAnew (text: string): string {
  return text.replace(/retry_count = CASE WHEN (started_on IS NOT NULL)/, `completed_on = NULL,
        retry_limit = ${RETRY_LIMIT}, expire_seconds = ${EXPIRE_SECONDS}, heartbeat_seconds = ${EXPIRE_SECONDS},
        retry_count = CASE WHEN state = 'created' OR retry_limit > ${RETRY_LIMIT} THEN 0 WHEN $1`)
}

/** Remembers what was made of each text. There are a few for each queue. */
function remembered (change: (text: string) => string): (text: string) => string {
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
