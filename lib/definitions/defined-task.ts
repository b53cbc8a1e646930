import type { FastifyBaseLogger } from 'fastify'
import type { AsyncResource } from 'node:async_hooks'
import type { Job, JobError, JobRecord, JobState, Json, Verdict } from '../engines/engine.js'
import { FST_BGT_INVALID_OPTION, FST_BGT_INVALID_PAYLOAD } from '../errors.js'
import { attempt, isThenable } from '../foreign.js'
import { BackgroundTask, type TaskBindings, type TaskState } from '../tasks/background-task.js'
import type { LastFunction } from '../tasks/last-function.js'
import type { AddedOptions } from '../tasks/task-options.js'
import { AttemptContext, loggerOf, type Surroundings } from './attempt-context.js'
import type { FailedTaskContext } from './define-task.js'
import { whyNotRunnable, type CompiledDefinition } from './definitions.js'
import { StoredJob, type Envelope } from './envelope.js'
import { toJobError } from './job-error.js'
import { resultToJson } from './payload.js'
import { runInThread, type ThreadPool } from './thread.js'
import type { TravellingContext } from './travelling-context.js'

/** A payload: JSON that was made here, or a value that an engine found. */
export type JobInput = { readonly text: string } | { readonly found: unknown }

/** The memory of tasks of definitions, which decides which of several tasks with the same key runs. */
export interface TaskHistory {
  claim: (task: DefinedTask) => boolean
  taskEnded: (task: DefinedTask) => void
}

/** What a task needs of its app until it has ended. The record of an ended task holds no logger. */
export interface TaskSurroundings extends Surroundings {
  readonly history: TaskHistory
  /** The pool for tasks that have a file. */
  readonly threads: ThreadPool | undefined
  /** What restores the captured value of a request. */
  readonly context: TravellingContext | undefined
}

const NOTHING = { found: undefined }

/** A task of a definition, with its payload, its attempts and its record. */
export class DefinedTask extends BackgroundTask {
  readonly compiled: CompiledDefinition
  readonly envelope: Envelope
  /** Attempts so far. */
  attempt: number
  /** The time by `performance.now()` before which the task does not start. Somebody may set the clock of the machine meanwhile. */
  dueAt: number
  /** The time by `performance.now()` when the task ended. */
  endedAt: number | undefined
  #result: Json | undefined
  #error: JobError | undefined
  #startedAt: number | undefined
  #finishedAt: number | undefined
  #surroundings: TaskSurroundings | undefined
  #log: FastifyBaseLogger | undefined
  #input: JobInput
  /** Whether the run is an attempt. If no attempt is left, the task fails without one. */
  #isAttempted = false
  /** Whether the task has failed, and its `onFailed` has not ended. */
  #isFailing = false
  /** Whether the task was cancelled while its `onFailed` ran. */
  #isCancelled = false
  /** The error with which an attempt was refused. Its class alone does not tell, because the handler may throw an error of the same class. */
  #refusal: unknown

  constructor (compiled: CompiledDefinition, envelope: Envelope, input: JobInput, surroundings: TaskSurroundings, options: AddedOptions) {
    super(() => this.#callHandler())
    this.compiled = compiled
    this.envelope = envelope
    this.options = options
    this.attempt = Math.min((envelope.delivery?.attempt ?? 1) - 1, compiled.definition.retry.attempts)
    this.dueAt = envelope.delivery === undefined ? performance.now() + envelope.delayMs : 0
    this.#input = input
    this.#surroundings = surroundings
  }

  override get id (): string {
    return this.envelope.id
  }

  override get name (): string {
    return this.compiled.definition.name
  }

  override toBindings (): TaskBindings {
    const { id, name, attempt } = this
    return { id, name, attempt }
  }

  /** The logger of the request that added the task, or the app's; undefined after the end of a task that was added here. */
  get log (): FastifyBaseLogger | undefined {
    if (this.#log === undefined && this.#surroundings !== undefined) this.#log = loggerOf(this.#surroundings, this.envelope)
    return this.#log
  }

  /** Whether an engine has delivered the task. */
  get isDelivered (): boolean {
    return this.envelope.delivery !== undefined
  }

  /** Whether an attempt may still be made. A process that made the last one has died, if not. */
  get #hasAttempts (): boolean {
    return this.attempt < this.compiled.definition.retry.attempts
  }

  /** Milliseconds until the task may start. */
  get waitMs (): number {
    return this.dueAt - performance.now()
  }

  /** Whether the task may start. A task may not if another one of its key was first. */
  claim (): boolean {
    // A task that has not ended has surroundings.
    return this.attempt > 0 || this.envelope.key === undefined || (this.#surroundings as TaskSurroundings).history.claim(this)
  }

  override begin (): void {
    super.begin()
    this.#startedAt = Date.now()
    this.#isAttempted = this.#hasAttempts
    if (this.#isAttempted) this.attempt++
  }

  /** Ends the task, and lets its payload go. A task that has failed keeps it, because somebody may retry it. */
  override end (state: TaskState, last?: LastFunction): AsyncResource {
    const call = super.end(state, last)
    this.#finishedAt = Date.now()
    this.endedAt = performance.now()
    this.#isFailing = state === 'failed'
    if (state !== 'failed') this.#input = NOTHING
    // The engine waits for a verdict.
    if (state === 'skipped') this.settle({ kind: 'cancelled' })
    this.#surroundings?.history.taskEnded(this)
    // The log lines about a delivered job still need its logger, and no record keeps such a task.
    if (this.isDelivered) return call
    this.#surroundings = undefined
    this.#log = undefined
    return call
  }

  /** What follows a failed attempt: milliseconds until the next one, or the error with which the task has failed for good. */
  afterFailure (error: unknown): { readonly delayMs: number } | { readonly error: unknown } {
    const { definition } = this.compiled
    const { attempts, when } = definition.retry
    this.#error = toJobError(error)
    if (this.attempt >= attempts || this.#isRefused(error)) return { error }
    try {
      const isWorthIt: unknown = when === undefined || when(error)
      if (isThenable(isWorthIt)) {
        const words = new Error(`retry.when of the task "${this.name}" returned a promise: it is asked synchronously`, { cause: error })
        this.#error = toJobError(words)
        return { error: words }
      }
      return isWorthIt ? { delayMs: definition.backoffMs(this.attempt) } : { error }
    } catch {
      // `retry.when` threw, so nothing says that another attempt is worth it.
      return { error }
    }
  }

  /** The task has failed without an attempt: its `when` threw, or no engine has stored it. */
  neverStarted (error: unknown): { readonly error: unknown } {
    this.#error = toJobError(error)
    return { error }
  }

  /** A function that calls the definition's `onFailed`. Undefined if there is none, or if the payload was refused. */
  onFailedCall (error: unknown): (() => unknown) | undefined {
    const { definition, read } = this.compiled
    const { onFailed } = definition
    if (onFailed === undefined || this.#isRefused(error)) return undefined
    const input = this.#input
    // The task has not ended yet, so it has its input and its surroundings.
    const surroundings = this.#surroundings as TaskSurroundings
    const context: FailedTaskContext = {
      id: this.id,
      attempts: this.attempt,
      log: this.log as FastifyBaseLogger,
      app: surroundings.app
    }
    return () => this.#restored(() => onFailed(read(parse(input)) as never, error, context), () => this.#isFailing, surroundings)
  }

  succeeded (result: unknown): void {
    try {
      this.#result = resultToJson(result)
    } catch (err) {
      // The work is done, and another attempt would not make its result JSON.
      attempt(() => { this.log?.warn({ err, task: { id: this.id, name: this.name } }, 'the result of a background task is not JSON: it is not kept') })
    }
    this.#error = undefined
    this.settle({ kind: 'done', result: this.#result ?? null })
  }

  /** Whether the task has failed, and nothing of it runs any more. */
  get hasFailedForGood (): boolean {
    return this.jobState === 'failed' && !this.#isFailing
  }

  /** Skips the task after it has failed, while its `onFailed` runs. @returns whether the task was skipped */
  cancelFailing (): boolean {
    if (!this.#isFailing || this.#isCancelled) return false
    this.#isCancelled = true
    this.#input = NOTHING
    return true
  }

  /** Tells the engine that has delivered the task what has become of it. */
  settle (verdict: Verdict): void {
    this.#isFailing = false
    this.envelope.delivery?.settle(verdict)
  }

  /** The job that an engine is to store. */
  toStored (): Job {
    // A task that is to be stored was added here, so its input is JSON.
    const { text } = this.#input as { readonly text: string }
    return new StoredJob(this.envelope, this.name, text, Math.max(this.waitMs, 0))
  }

  /** The payload, until the task has ended in another way than by a failure. */
  get input (): JobInput {
    return this.#input
  }

  /** @param withPayload whether the record carries the payload */
  toRecord (withPayload = false): JobRecord {
    const state = this.jobState
    return {
      id: this.id,
      name: this.name,
      state,
      attempt: this.attempt,
      enqueuedAt: new Date(this.envelope.enqueuedAt).toISOString(),
      ...this.#startedAt !== undefined && { startedAt: new Date(this.#startedAt).toISOString() },
      ...this.#finishedAt !== undefined && { finishedAt: new Date(this.#finishedAt).toISOString() },
      ...this.#error !== undefined && state !== 'skipped' && { error: this.#error },
      ...this.#result !== undefined && { result: this.#result },
      ...withPayload && this.#input !== NOTHING && { payload: parse(this.#input) }
    }
  }

  get jobState (): JobState {
    if (this.#isCancelled) return 'skipped'
    // A task that an engine has is not looked for here, so the state is never `enqueued`.
    if (this.state !== 'pending') return this.state as JobState
    if (this.attempt > 0) return 'retrying'
    return this.waitMs > 0 ? 'delayed' : 'pending'
  }

  /** Makes one attempt. */
  #callHandler (): unknown {
    const { definition } = this.compiled
    if (!this.#isAttempted) throw new Error('no attempt is left: the process that ran the last one died')
    // A task that has not ended has surroundings.
    const { app, threads } = this.#surroundings as TaskSurroundings
    const { name, handler, file } = definition
    this.#refusal = whyNotRunnable(definition, threads)
    if (this.#refusal !== undefined) throw this.#refusal
    const payload = this.#read()
    const context = new AttemptContext(this, this.log as FastifyBaseLogger, app)
    const call = (): unknown => handler === undefined ? runInThread(threads as ThreadPool, name, file as string, payload, context) : handler(payload as never, context)
    return this.#restored(call, () => this.state === 'running' && this.attempt === context.attempt)
  }

  /** Makes a call of the user's code with the captured value of the request restored. */
  #restored (call: () => unknown, isWanted: () => boolean, surroundings = this.#surroundings): unknown {
    const { context: text } = this.envelope
    const context = surroundings?.context
    return text === undefined || context === undefined ? call() : context.around(text, call, isWanted)
  }

  /** @throws FST_BGT_INVALID_PAYLOAD if the schema refuses what an engine found */
  #read (): unknown {
    try {
      return this.compiled.read(parse(this.#input))
    } catch (error) {
      this.#refusal = error
      throw error
    }
  }

  #isRefused (error: unknown): boolean {
    return error === this.#refusal && (error instanceof FST_BGT_INVALID_PAYLOAD || error instanceof FST_BGT_INVALID_OPTION)
  }
}

/** Each attempt has its own copy of a payload that was added here, because handlers may change it. */
function parse (input: JobInput): unknown {
  return 'text' in input ? JSON.parse(input.text) : input.found
}

/** The task, if it is one of a definition. Undefined for a task of a function. */
export function asDefined (task: BackgroundTask): DefinedTask | undefined {
  return task instanceof DefinedTask ? task : undefined
}
