/**
 * What an engine is: an adapter to an existing durable queue. It speaks to its library and to nothing else; validation,
 * timeouts, retry decisions, log lines, trace headers and the choice of placement are the core's, on both sides.
 */
import type { FastifyBaseLogger } from 'fastify'

/** What survives a JSON round trip. */
export type Json = null | boolean | number | string | Json[] | { [key: string]: Json }

/** A definition, as far as an engine has to know it: it has one queue. */
export interface TaskSpec {
  /** Not empty; letters, digits, `-`, `_` and `.` only. */
  readonly name: string
  /** Starts that a job may have, those whose process died included. At least 1. */
  readonly attempts: number
  /** Milliseconds that one attempt may take, if it is limited. */
  readonly timeout: number | undefined
  /** Seconds for which the record of an ended job is kept. */
  readonly keep: { readonly succeeded: number, readonly failed: number }
  /** Jobs of it that this process runs at once, when it consumes. At least 1. */
  readonly concurrency: number
}

/** A job to be stored. */
export interface Job {
  /** A UUID, made before. */
  readonly id: string
  /** The name of its definition. */
  readonly task: string
  /** The payload, checked, as JSON. */
  readonly text: string
  /** The same, parsed at each read: an engine that stores text has no use for it. */
  readonly payload: Json
  /** Milliseconds from now until it may start; 0: at once. */
  readonly delayMs: number
  /** Whether a job of this id may be stored already: then that one stays as it is, and the receipt says `duplicate`. */
  readonly keyed: boolean
  /** Milliseconds since the epoch. */
  readonly enqueuedAt: number
  /** Trace context, and what a subscriber of the `enqueue` channel added. */
  readonly headers: Readonly<Record<string, string>>
  /** Of the request that added it. */
  readonly requestId: string | undefined
}

/** The engine's word that a job is stored. */
export interface Receipt {
  /** The job's, by which `get` finds it. */
  readonly id: string
  /** Whether a job of this id was stored before: this one was not stored again. */
  readonly duplicate: boolean
}

/** One attempt to run a job, in a process that consumes. */
export interface Delivery {
  /** The job's. */
  readonly id: string
  /** The name of its definition. */
  readonly task: string
  /** As it was found: someone else may have written it. */
  readonly payload: unknown
  /** 1 for the first start. Counts the starts whose process died, and none that was released. */
  readonly attempt: number
  /** Milliseconds since the epoch, if they are known. */
  readonly enqueuedAt: number | undefined
  /** Those of the job; empty if it has none. */
  readonly headers: Readonly<Record<string, string>>
  /** Of the request that added it, if there is one. */
  readonly requestId: string | undefined
}

/** An error as it is stored. */
export interface JobError {
  /** `error.name`. */
  readonly name: string
  /** `error.message`. */
  readonly message: string
  /** `error.code`, of an error that has one. */
  readonly code?: string
}

/**
 * What has become of an attempt, and what the engine has to do:
 * - `done`: the job has succeeded; its result is kept.
 * - `retry`: the attempt failed; it is to start again after `delayMs`.
 * - `failed`: the job has failed for good, whatever attempts are left.
 * - `released`: the process is stopping; another one starts it again at once, and this start does not count.
 */
export type Verdict =
  | { readonly kind: 'done', readonly result: Json }
  | { readonly kind: 'retry', readonly error: JobError, readonly delayMs: number }
  | { readonly kind: 'failed', readonly error: JobError }
  | { readonly kind: 'released' }

/**
 * - `pending`: waits for its turn
 * - `delayed`: its `delay` is not over
 * - `running`: an attempt has started
 * - `retrying`: an attempt has failed, and another one will start
 * - `succeeded`, `failed`: has ended
 * - `skipped`, `abandoned`: was not run, see `TaskState`; on pg-boss, `abandoned` is a job that somebody cancelled there
 */
export type JobState = 'pending' | 'delayed' | 'running' | 'retrying' | 'succeeded' | 'failed' | 'skipped' | 'abandoned'

/** A task read back. Times are ISO 8601, so that a response schema with `format: 'date-time'` fits. */
export interface JobRecord {
  /** The task's. */
  readonly id: string
  /** The name of its definition. */
  readonly name: string
  /** What has become of it so far. */
  readonly state: JobState
  /** Starts so far; 0 while it waits for the first. */
  readonly attempt: number
  /** When it was added or stored. */
  readonly enqueuedAt: string
  /** When its last attempt started. */
  readonly startedAt?: string
  /** When it ended. */
  readonly finishedAt?: string
  /** The error of the last attempt, of a job that is `failed` or `retrying`. */
  readonly error?: JobError
  /** What the handler returned, of a job that has `succeeded`. */
  readonly result?: Json
}

/** What an engine tells of itself. */
export interface EngineEvents {
  /** The app's. */
  readonly log: FastifyBaseLogger
  /** Something failed outside any call: a lost connection, a fetch. Logged once per outage; no values are passed on. */
  readonly error: (error: Error) => void
}

/**
 * An adapter to a durable queue.
 * @typeParam Tx what `enqueue(…, { tx })` accepts; `never` without transactions
 */
export interface TaskEngine<Tx = never> {
  /** For log lines and errors. */
  readonly name: string

  /** What it can do. The rest is refused before it is asked: `FST_BGT_UNSUPPORTED`. */
  readonly supports: { readonly delay: boolean, readonly key: boolean, readonly tx: boolean, readonly get: boolean }

  /** Whether jobs of concurrent requests are better stored together, in one call. */
  readonly groups: boolean

  /**
   * Connects and declares one queue per definition, also where they exist with other settings. Rejects when that is not
   * possible now, having let go all that it took; it is then called again, until it resolves. Later losses of the
   * connection are the engine's to mend, without end.
   */
  start (tasks: readonly TaskSpec[], events: EngineEvents): Promise<void>

  /**
   * Stores jobs, of any of the definitions: all of them or, if it rejects, perhaps some. Resolves once they are stored,
   * receipts in the order of the jobs. No id is in it twice. Rejects within seconds when the server cannot be reached.
   * Called only after `start` has resolved, until `stop`.
   */
  enqueue (jobs: readonly Job[], options?: { readonly tx?: Tx }): Promise<Receipt[]>

  /**
   * Runs jobs, of each definition `concurrency` at once, from now. `run` never rejects. A job whose process dies starts
   * again elsewhere, within 15 s by default, with a higher `attempt`; `run` decides when those are used up, so no job may
   * end without its word.
   */
  consume (run: (delivery: Delivery) => Promise<Verdict>): Promise<void>

  /** Takes no further jobs. What runs goes on, and jobs can still be stored. */
  pause (): Promise<void>

  /** Reads a job back; undefined if there is none, or its record was not kept. */
  get (task: string, id: string): Promise<JobRecord | undefined>

  /**
   * Waits until what is running has its verdict and the server knows it, at most `drainMs`, then closes every connection.
   * Resolves also when it was never started, or the server is gone.
   */
  stop (options: { readonly drainMs: number }): Promise<void>
}
