import type { FastifyBaseLogger, FastifyInstance } from 'fastify'
import type { BackgroundTask } from '../tasks/background-task.js'
import type { FailedTaskContext, TaskContext } from './define-task.js'
import type { KnownTask } from './definitions.js'
import type { Job, JobError, JobRecord, JobState, Json, Verdict } from '../engines/engine.js'
import { FST_BGT_INVALID_PAYLOAD } from '../errors.js'
import type { History } from './history.js'
import { attempt, isThenable, readOr } from '../foreign.js'
import { resultToJson } from './payload.js'
import { types } from 'node:util'

const NOTHING = { found: undefined }

/** A payload as JSON, or as an engine found it. */
export type JobInput = { readonly text: string } | { readonly found: unknown }

/** Where a job comes from: it was added here, or an engine has delivered it. It is kept with the record, and holds no payload. */
export interface JobOrigin {
  readonly id: string
  readonly key: string | undefined
  readonly delayMs: number
  readonly enqueuedAt: number
  readonly headers: Record<string, string>
  readonly requestId: string | undefined
  readonly delivery?: { readonly attempt: number, readonly settle: (verdict: Verdict) => void }
}

/** What a handler is given of the app. */
export interface JobSurroundings {
  readonly app: FastifyInstance
  readonly log: FastifyBaseLogger
  readonly history: History
}

/** A task of a definition: its payload, its attempts, and what is known of it. */
export class TaskJob {
  readonly known: KnownTask
  readonly origin: JobOrigin
  /** Starts so far. */
  attempt: number
  /** `performance.now()` before which it does not start: the clock of the machine may be set meanwhile. */
  dueAt: number
  result: Json | undefined
  error: JobError | undefined
  startedAt: number | undefined
  finishedAt: number | undefined
  /** `performance.now()` when it ended. */
  endedAt: number | undefined
  /** Until the task has ended: a record keeps no logger. */
  #surroundings: JobSurroundings | undefined
  #input: JobInput
  /** Why the payload was refused: an error of this class may be the handler's own, too. */
  #refusal: unknown

  constructor (known: KnownTask, origin: JobOrigin, input: JobInput, surroundings: JobSurroundings) {
    this.known = known
    this.origin = origin
    this.attempt = (origin.delivery?.attempt ?? 1) - 1
    this.dueAt = origin.delivery === undefined ? performance.now() + origin.delayMs : 0
    this.#input = input
    this.#surroundings = surroundings
  }

  get name (): string {
    return this.known.definition.name
  }

  get log (): FastifyBaseLogger | undefined {
    return this.#surroundings === undefined ? undefined : loggerOf(this.#surroundings, this.origin)
  }

  /** Milliseconds until it may start. */
  waitMs (): number {
    return this.dueAt - performance.now()
  }

  started (): void {
    this.attempt++
    this.startedAt = Date.now()
  }

  /**
   * One attempt.
   * @throws FST_BGT_INVALID_PAYLOAD for what an engine found
   */
  run (task: BackgroundTask): unknown {
    const { definition } = this.known
    if (this.attempt > definition.retry.attempts) throw new Error('no attempt is left: the process that ran the last one died, or the job was put back by hand')
    // One that has not ended has surroundings.
    return definition.handler(this.#read() as never, new AttemptContext(this, task, this.#surroundings as JobSurroundings))
  }

  /** What becomes of a failed attempt: milliseconds until the next one, or the error with which the job has failed for good. */
  afterFailure (error: unknown): { readonly delayMs: number } | { readonly error: unknown } {
    const { definition } = this.known
    const { attempts, when } = definition.retry
    this.error = toJobError(error)
    if (this.attempt >= attempts || this.#isRefused(error)) return { error }
    try {
      const isWorthIt: unknown = when === undefined || when(error)
      if (isThenable(isWorthIt)) {
        const words = new Error(`retry.when of the task "${this.name}" returned a promise: it is asked synchronously`, { cause: error })
        this.error = toJobError(words)
        return { error: words }
      }
      return isWorthIt ? { delayMs: definition.backoffMs(this.attempt) } : { error }
    } catch {
      // What cannot be decided is not tried again.
      return { error }
    }
  }

  /** Its `when` has failed: no attempt was made, and none will be. */
  neverStarted (error: unknown): { readonly error: unknown } {
    this.error = toJobError(error)
    return { error }
  }

  /** The call of the definition's `onFailed`, if it has one. */
  lastWord (error: unknown): (() => unknown) | undefined {
    const { onFailed, retry } = this.known.definition
    if (onFailed === undefined || this.#isRefused(error)) return undefined
    const input = this.#input
    // It has not ended yet, and has both.
    const surroundings = this.#surroundings as JobSurroundings
    const context: FailedTaskContext = {
      id: this.origin.id,
      attempts: Math.min(this.attempt, retry.attempts),
      log: loggerOf(surroundings, this.origin),
      app: surroundings.app
    }
    return () => onFailed(this.known.read(parse(input)) as never, error, context)
  }

  succeeded (result: unknown): void {
    try {
      this.result = resultToJson(result)
    } catch (err) {
      // The work is done: to do it again would not make its result JSON.
      attempt(() => { this.log?.warn({ err, task: { id: this.origin.id, name: this.name } }, 'the result of a background task is not JSON: it is not kept') })
    }
    this.error = undefined
    this.settle({ kind: 'done', result: this.result ?? null })
  }

  /** An engine is told what has become of its delivery. */
  settle (verdict: Verdict): void {
    this.origin.delivery?.settle(verdict)
  }

  /** The task has ended: its payload is let go. */
  ended (task: BackgroundTask): void {
    this.finishedAt = Date.now()
    this.endedAt = performance.now()
    this.#input = NOTHING
    this.#surroundings?.history.ended(task)
    // The lines about a delivery still need its logger, and no record holds it.
    if (this.origin.delivery === undefined) this.#surroundings = undefined
  }

  /** The job as an engine stores it. */
  toStored (): Job {
    // What is stored was added here, and is JSON.
    const { text } = this.#input as { readonly text: string }
    return new StoredJob(this.origin, this.name, text, Math.max(this.waitMs(), 0))
  }

  toRecord (task: BackgroundTask): JobRecord {
    const { startedAt, finishedAt, error, result } = this
    return {
      id: this.origin.id,
      name: this.name,
      state: this.#state(task),
      attempt: this.attempt,
      enqueuedAt: new Date(this.origin.enqueuedAt).toISOString(),
      ...startedAt !== undefined && { startedAt: new Date(startedAt).toISOString() },
      ...finishedAt !== undefined && { finishedAt: new Date(finishedAt).toISOString() },
      ...error !== undefined && { error },
      ...result !== undefined && { result }
    }
  }

  #read (): unknown {
    try {
      return this.known.read(parse(this.#input))
    } catch (error) {
      this.#refusal = error
      throw error
    }
  }

  #isRefused (error: unknown): boolean {
    return error === this.#refusal && error instanceof FST_BGT_INVALID_PAYLOAD
  }

  #state (task: BackgroundTask): JobState {
    // One that an engine has is not looked for here.
    if (task.state !== 'pending') return task.state as JobState
    if (this.attempt > 0) return 'retrying'
    return this.waitMs() > 0 ? 'delayed' : 'pending'
  }
}

/** The logger of a job: that of a delivery has the id of the request that it comes from, under the name that the app's own lines have for it. */
function loggerOf ({ app, log }: JobSurroundings, { delivery, requestId }: JobOrigin): FastifyBaseLogger {
  if (delivery === undefined || requestId === undefined) return log
  return readOr(log, () => log.child({ [String(app.initialConfig.requestIdLogLabel)]: requestId }))
}

const TASK = Symbol('task')

/** What a handler is given. */
class AttemptContext implements TaskContext {
  readonly id: string
  readonly attempt: number
  declare readonly signal: AbortSignal
  readonly log: FastifyBaseLogger
  readonly app: FastifyInstance
  readonly headers: Readonly<Record<string, string>>
  readonly requestId: string | undefined
  readonly [TASK]: BackgroundTask

  constructor (job: TaskJob, task: BackgroundTask, surroundings: JobSurroundings) {
    this.id = job.origin.id
    this.attempt = job.attempt
    this.log = loggerOf(surroundings, job.origin)
    this.app = surroundings.app
    this.headers = job.origin.headers
    this.requestId = job.origin.requestId
    this[TASK] = task
    Object.defineProperty(this, 'signal', SIGNAL)
  }
}

/**
 * Made on first read, and the context's own, for those who spread it. All contexts share one getter: of one that each has for
 * itself, in a literal, V8 keeps the shape until the next full collection, and the task with it. Measured: 1 kB and 13 µs a job.
 */
const SIGNAL = { enumerable: true, get (this: AttemptContext): AbortSignal { return this[TASK].signal } }

class StoredJob implements Job {
  readonly id: string
  readonly task: string
  readonly text: string
  readonly delayMs: number
  readonly keyed: boolean
  readonly enqueuedAt: number
  readonly headers: Readonly<Record<string, string>>
  readonly requestId: string | undefined

  constructor ({ id, key, enqueuedAt, headers, requestId }: JobOrigin, task: string, text: string, delayMs: number) {
    this.id = id
    this.task = task
    this.text = text
    this.delayMs = delayMs
    this.keyed = key !== undefined
    this.enqueuedAt = enqueuedAt
    this.headers = headers
    this.requestId = requestId
  }

  get payload (): Json {
    return JSON.parse(this.text) as Json
  }
}

/** Each attempt has a payload of its own. */
function parse (input: JobInput): unknown {
  return 'text' in input ? JSON.parse(input.text) : input.found
}

/** The job of a task that has a definition. */
export function jobOf (task: BackgroundTask): TaskJob {
  // Who asks knows that it has one.
  return task.options?.job as TaskJob
}

/** Anything can be thrown: an error of another realm (as Node's own are in jest), one whose getters throw, no error at all. */
export function toJobError (error: unknown): JobError {
  const isError = readOr(false, () => error instanceof Error || types.isNativeError(error))
  if (!isError) return { name: 'Error', message: `a ${error === null ? 'null' : typeof error} was thrown` }
  const read = (key: string): string | undefined => readOr(undefined, () => {
    const value: unknown = (error as Record<string, unknown>)[key]
    return typeof value === 'string' ? value : undefined
  })
  const code = read('code')
  return { name: read('name') ?? 'Error', message: read('message') ?? '', ...code !== undefined && { code } }
}
