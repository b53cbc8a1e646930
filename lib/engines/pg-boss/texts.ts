/**
 * Statements of pg-boss that this adapter runs, changed in one place each. pg-boss has no option for it. A statement of an unknown text is
 * run as it is.
 */

/** Milliseconds that a statement waits for a lock that another transaction holds. */
const LOCK_MS = 200

/**
 * A parameter, as an expression that also limits how long the statement waits for locks: for those of rows, and of keys that another
 * transaction has stored and not committed. The limit ends with the transaction, so a pooler may give the connection to anybody afterwards.
 */
export function limitingLocks (parameter: string): string {
  return `(CASE WHEN set_config('lock_timeout', '${LOCK_MS}', true) <> '' THEN ${parameter}::text END)`
}

/** pg-boss's insert, which waits for locks only so long. */
export const insertWithLimit = remembered(text => text.replace('$1::text', limitingLocks('$1')))

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
