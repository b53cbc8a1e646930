/**
 * What an engine is: an adapter to an existing durable queue. An engine speaks to its library and to nothing else. The rest is done by the
 * core, on both sides: validation, timeouts, retry decisions, log lines, trace headers and the choice of placement.
 */
import type { FastifyBaseLogger } from 'fastify'

/** A value that survives a JSON round trip. */
export type Json = null | boolean | number | string | Json[] | { [key: string]: Json }

/** What an engine has to know about a definition. Each definition has one queue. */
export interface TaskSpec {
  /** The name of the definition: letters, digits, `-`, `_` and `.` only, at least one. */
  readonly name: string
  /** The most attempts of a job, those whose process died included. At least 1. */
  readonly attempts: number
  /** Milliseconds that one attempt may take, if it is limited. */
  readonly timeout: number | undefined
  /** Seconds for which the record of an ended job is kept. */
  readonly keep: { readonly succeeded: number, readonly failed: number }
  /** The most jobs of this definition that the process runs at the same time. 0 if the process only stores them, so that it does not consume them. */
  readonly concurrency: number
}

/** A job to be stored. */
export interface Job {
  /** A UUID, made by the core. */
  readonly id: string
  /** The name of its definition. */
  readonly task: string
  /** The checked payload, as JSON. */
  readonly text: string
  /** The payload as a value, which each read parses anew. An engine that stores text has no use for it. */
  readonly payload: Json
  /** Milliseconds from now until the job may start. 0 means immediately. */
  readonly delayMs: number
  /** Whether a job of this id may be stored already. If there is one, it stays as it is, and the receipt says `duplicate`. */
  readonly keyed: boolean
  /** When the task was added, in milliseconds since the epoch. */
  readonly enqueuedAt: number
  /** Trace context, and what a subscriber of the `enqueue` channel added. */
  readonly headers: Readonly<Record<string, string>>
  /** The id of the request that added the task. */
  readonly requestId: string | undefined
  /** The value that the option `context` has captured, as JSON of at most 4,096 bytes. It is stored as this text. */
  readonly context?: string | undefined
}

/** The engine's confirmation that a job is stored. */
export interface Receipt {
  /** The id of the job, by which `get` finds it. */
  readonly id: string
  /** Whether a job of this id was stored before. If so, this one was not stored again. */
  readonly duplicate: boolean
}

/** One attempt of a job, in a process that consumes. */
export interface Delivery {
  /** The id of the job. */
  readonly id: string
  /** The name of its definition. */
  readonly task: string
  /** The payload as it was found. Somebody else may have written it. */
  readonly payload: unknown
  /**
   * The number of this attempt, 1 for the first. Attempts whose process died count, and attempts that were returned to the engine
   * (`released`) do not.
   */
  readonly attempt: number
  /** When the task was added, in milliseconds since the epoch. Undefined if that is not known. */
  readonly enqueuedAt: number | undefined
  /** The headers of the job. Empty if it has none. */
  readonly headers: Readonly<Record<string, string>>
  /** The id of the request that added the task. Undefined if there is none. */
  readonly requestId: string | undefined
  /** The `context` of the job. Undefined if there is none. */
  readonly context?: string | undefined
}

/** An error as it is stored. */
export interface JobError {
  /** `error.name`. */
  readonly name: string
  /** `error.message`. */
  readonly message: string
  /** `error.code`, if the error has one. */
  readonly code?: string
}

/**
 * What has become of an attempt, and what the engine has to do:
 * - `done`: the job has succeeded; its result is kept.
 * - `retry`: the attempt has failed; the next one is to start after `delayMs`.
 * - `failed`: the job has failed for good, whatever attempts are left.
 * - `released`: the job is returned to the engine, because the process is stopping; another process starts it again immediately, and this
 *   attempt does not count.
 * - `cancelled`: somebody has cancelled the job; it ends as `skipped`, if `cancel` has not ended it already.
 */
export type Verdict =
  | { readonly kind: 'done', readonly result: Json }
  | { readonly kind: 'retry', readonly error: JobError, readonly delayMs: number }
  | { readonly kind: 'failed', readonly error: JobError }
  | { readonly kind: 'released' }
  | { readonly kind: 'cancelled' }

/**
 * The state of a task in its record:
 * - `pending`: waits for its turn
 * - `delayed`: its `delay` is not over
 * - `running`: an attempt has started
 * - `retrying`: an attempt has failed, and another one will start
 * - `succeeded`, `failed`: has ended
 * - `skipped`: was cancelled, or was not run, see `TaskState`
 * - `abandoned`: was cut off, see `TaskState`
 */
export type JobState = 'pending' | 'delayed' | 'running' | 'retrying' | 'succeeded' | 'failed' | 'skipped' | 'abandoned'

/** A task read back. Times are ISO 8601, so that they fit a response schema with `format: 'date-time'`. */
export interface JobRecord {
  /** The id of the task. */
  readonly id: string
  /** The name of its definition. */
  readonly name: string
  /** What has become of the task so far. */
  readonly state: JobState
  /** Attempts so far. 0 while the task waits for the first. */
  readonly attempt: number
  /** When the task was added or stored. */
  readonly enqueuedAt: string
  /** When the last attempt started. */
  readonly startedAt?: string
  /** When the task ended. */
  readonly finishedAt?: string
  /** The error of the last attempt, if the task is `failed` or `retrying`. */
  readonly error?: JobError
  /** What the handler returned, if the task has `succeeded`. */
  readonly result?: Json
  /** The payload, if `find` was asked for it, and somebody still has it. */
  readonly payload?: unknown
}

/** How many jobs of one definition are in each state, those of all processes together. An engine leaves out what it cannot tell. */
export interface JobCounts {
  /** Wait for their turn. */
  readonly pending: number
  /** Wait until their `delay` is over. */
  readonly delayed?: number
  /** An attempt has started. */
  readonly running?: number
  /** An attempt has failed, and another one will start. */
  readonly retrying?: number
  /** Have failed for good, and their record is kept. */
  readonly failed: number
}

/** Where a record is in the order of `find`. */
export interface JobPosition {
  /** Milliseconds since the epoch. */
  readonly enqueuedAt: number
  readonly id: string
}

/** Which records `find` reads: those of one state, newest first by `enqueuedAt`, and of one time those with the greatest id first. */
export interface JobQuery {
  readonly state: JobState
  /** The most records. At least 1. */
  readonly limit: number
  /** Where the record is behind which the page begins. Nothing may have its id any more. Undefined for the first page. */
  readonly after: JobPosition | undefined
  /** Whether the records carry their payloads. */
  readonly payload: boolean
}

/** How an engine reports what happens outside its calls. */
export interface EngineEvents {
  /** The app's logger. */
  readonly log: FastifyBaseLogger
  /**
   * Reports what failed outside any call, such as a lost connection or a fetch. Only the message is logged, and it must not quote values. It
   * is logged again only when it has not come for 30 s, so that one outage is one line.
   */
  readonly error: (error: Error) => void
  /**
   * Tells that somebody has cancelled a job that runs in this process. The core then aborts its signal, and its verdict is `cancelled`. A job
   * that does not run here any more is passed over.
   */
  readonly cancelled: (task: string, id: string) => void
}

/**
 * An adapter to a durable queue.
 * @typeParam Tx what `enqueue` gets as `tx`: `{ executeSql(text, values) }`; `never` without transactions
 */
export interface TaskEngine<Tx = never> {
  /** The name of the engine, for log lines and errors. */
  readonly name: string

  /** What the engine can do. The core refuses everything else, with `FST_BGT_UNSUPPORTED`, before it calls the engine. */
  readonly supports: {
    readonly delay: boolean
    readonly key: boolean
    readonly tx: boolean
    readonly get: boolean
    readonly count: boolean
    readonly find: boolean
    readonly retry: boolean
    readonly cancel: boolean
  }

  /** Whether jobs of concurrent requests are better stored together, in one call. */
  readonly groups: boolean

  /**
   * Connects and declares one queue per definition, even if the queue exists with other settings. Rejects when that is not possible now,
   * after letting go everything that it took. The core then calls it again, until it resolves. After that the engine itself restores lost
   * connections, without end.
   */
  start (tasks: readonly TaskSpec[], events: EngineEvents): Promise<void>

  /**
   * Stores jobs of any of the definitions. Resolves when all of them are stored, with receipts in the order of the jobs. If it rejects,
   * some may have been stored. An error whose `code` is `FST_BGT_INVALID_PAYLOAD` says that the server can never store one of them, and goes to
   * whoever added it. No id is among the jobs twice. Rejects within seconds when the server cannot be reached. The core calls this
   * only after `start` has resolved, and before `stop`.
   */
  enqueue (jobs: readonly Job[], options?: { readonly tx?: Tx }): Promise<Receipt[]>

  /**
   * Runs jobs from now on, of each definition up to `concurrency` at the same time. `run` never rejects. A job whose process died starts
   * again in another process, within 15 s by default, with a higher `attempt`. `run` decides when the attempts are used up, so no job may end
   * without its verdict.
   */
  consume (run: (delivery: Delivery) => Promise<Verdict>): Promise<void>

  /** Takes no further jobs. Running jobs go on, and jobs can still be stored. */
  pause (): Promise<void>

  /** Reads a job back, with its payload if that is asked for. Resolves to undefined if there is none, or its record was not kept. */
  get (task: string, id: string, options?: { readonly payload: boolean }): Promise<JobRecord | undefined>

  /** Counts the jobs of a definition. An engine that supports `count` has this method. */
  count? (task: string): Promise<JobCounts>

  /** Reads records. An engine that supports `find` has this method. */
  find? (task: string, query: JobQuery): Promise<readonly JobRecord[]>

  /**
   * Starts a job again that has failed for good, with all its attempts, from 1. Resolves to false if no such job has failed. Of two calls for
   * one job only one is true. An engine that supports `retry` has this method.
   */
  retry? (task: string, id: string): Promise<boolean>

  /**
   * Cancels a job that has not ended: its record is `skipped` from now on, kept as long as that of a failed one, and its key is free.
   * `onFailed` is not called. Where the job runs, in any process, `EngineEvents.cancelled` is called there within 5 s. Resolves to false if
   * no such job is left. Of two calls for one job that waits only one is true. An engine that supports `cancel` has this method.
   */
  cancel? (task: string, id: string): Promise<boolean>

  /**
   * Calls back with the ids of jobs of a definition that end from now on, until the function that this resolves to is called. The core
   * calls this while somebody waits for a result, at most once at a time for a definition. An engine that cannot tell all of them may leave some
   * out: the core also looks by itself from time to time. An engine that has no such word has no such method.
   */
  watch? (task: string, onEnd: (ids: readonly string[]) => void): Promise<() => void>

  /** Whether the server can be reached, as far as the engine knows at this moment. If it does not say, its start counts. */
  readonly isConnected?: boolean

  /**
   * Waits until all running jobs have their verdict and the server knows it, `drainMs` milliseconds at most. Then it closes every
   * connection. Resolves also when the engine was never started, or the server is gone. After that, `start` may be called again. The core
   * also calls this while `start` hangs, which then rejects, and once more after that.
   */
  stop (options: { readonly drainMs: number }): Promise<void>
}
