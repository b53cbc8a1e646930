/**
 * Which attempt of a job comes next. BullMQ counts two things for as long as a job exists: `atm` rises with every verdict but `released`,
 * and `stc` with every attempt whose process died. When somebody puts a job back that has ended, both stay, or `atm` is removed. So the error
 * that is stored with a failed attempt says from which counts on the attempts of the job are numbered. BullMQ stores it in the same step
 * that moves the job, and no way of putting a job back removes it.
 */
import type { JobError } from '../engine.js'
import { isObject } from '../stored-task.js'

/** BullMQ's counts of a job. */
export interface Counts {
  readonly made: number
  readonly stalled: number
}

/** What the error of an attempt says beside the error. */
interface Numbering {
  /** The number of the attempt. */
  readonly attempt: number
  /** `atm` after this attempt. */
  readonly made: number
  /** The counts from which on attempts are numbered. After the last attempt these are the counts of that moment. */
  readonly from: readonly [made: number, stalled: number]
}

export const MAX_MESSAGE = 8192

/**
 * The error of an attempt, as BullMQ takes it. People and dashboards read its message, `failedReason`. What BullMQ keeps as the stack is
 * JSON, which `get` and the next attempt read.
 */
export class AttemptFailed extends Error {
  override readonly name = 'AttemptFailed'

  constructor ({ name, message, code }: JobError, numbering: Numbering) {
    const error = { name: cut(name), message: cut(message), ...code !== undefined && { code: cut(code) } }
    // The bare message is never used: BullMQ takes the message `bullmq:rateLimitExceeded` for an order.
    super(`${error.name}: ${error.message}`)
    this.stack = JSON.stringify({ ...error, ...numbering })
  }
}

/** The counts from which on the attempts of a job are numbered. */
export function numberedFrom (stacks: unknown, { made }: Counts, hasFailedReason: boolean): Counts {
  const last = lastNumbering(stacks)
  // Putting back removes the reason, which each failed attempt stores. A job that another program's worker has failed has no numbers.
  if (last === undefined) return { made: hasFailedReason ? 0 : made, stalled: 0 }
  const [from, stalled] = last.from
  // It has succeeded since, and was put back.
  if (made > last.made) return { made, stalled }
  // It was put back with `resetAttemptsMade`.
  if (made < from) return { made: 0, stalled }
  return { made: from, stalled }
}

/** Attempts that have ended. */
export function endedAttempts (counts: Counts, from: Counts): number {
  return Math.max(0, counts.made - from.made) + Math.max(0, counts.stalled - from.stalled)
}

/** The number of the attempt whose error was stored last. */
export function lastAttempt (stacks: unknown): number | undefined {
  return lastNumbering(stacks)?.attempt
}

/** The last error that was stored. The worker of another program stores stacks, where a worker of this package stores JSON. */
export function lastError (stacks: unknown): unknown {
  if (!Array.isArray(stacks)) return undefined
  return parse(stacks.at(-1))
}

export function parse (text: unknown): unknown {
  if (typeof text !== 'string') return null
  try {
    return JSON.parse(text)
  } catch {
    return null
  }
}

function lastNumbering (stacks: unknown): Numbering | undefined {
  const last = lastError(stacks)
  if (!isObject(last) || !Array.isArray(last['from'])) return undefined
  const numbers = [last['attempt'], last['made'], ...last['from'] as unknown[]]
  return numbers.length === 4 && numbers.every(number => Number.isSafeInteger(number)) ? last as unknown as Numbering : undefined
}

/** Somebody's error may hold the body of a response in its text. */
function cut (text: string): string {
  return text.length <= MAX_MESSAGE ? text : `${text.slice(0, MAX_MESSAGE)}… (${text.length} characters)`
}
