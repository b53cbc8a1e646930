import type { BackgroundTask } from '../tasks/background-task.js'
import type { AnyTaskDefinition, TaskDefinition } from '../definitions/define-task.js'
import { enqueue, get, type EnqueueArgs, type EnqueueOptions } from './enqueue.js'
import type { JobCounts, JobRecord, Receipt } from '../engines/engine.js'
import { BOOLEAN, check, type Rules } from '../rules.js'
import { cancel, count, find, health, result, retry, type FindOptions, type ResultOptions, type TaskHealth } from './operating.js'
import type { TaskFunction } from '../tasks/task-function.js'
import { checkTaskOptions, type TaskOptions } from '../tasks/task-options.js'
import type { TaskStats } from '../runner/ledger.js'
import type { AddedArgs, AddedTask, TaskAdder } from './task-adder.js'
import type { Intake } from './intake.js'

export type { EnqueueOptions, FindOptions, ResultOptions, TaskHealth }

/** Options of `app.backgroundTasks.idle()`. */
export interface IdleOptions {
  /**
   * Whether to reject with what a task threw since the last `idle()` returned, or since the plugin was registered. Several errors are
   * rejected as one `AggregateError` of the first 100. An error that was thrown before anybody waited may have been garbage-collected. A
   * new error takes its place then, with the same name and code, and with the old message in its own.
   * @default false
   */
  readonly rejectOnFailure?: boolean | undefined
}

const IDLE_RULES: Rules = { rejectOnFailure: BOOLEAN }

/** A task read back, with what its handler returned. */
export interface TaskRecord<Result = unknown> extends Omit<JobRecord, 'result' | 'payload'> {
  /** What the handler returned, as JSON, if the task has `succeeded`. */
  readonly result?: Result
}

/** A task that `find` has found. */
export interface FoundRecord<Result = unknown> extends TaskRecord<Result> {
  /** The payload, if it was asked for, and somebody still has it. */
  readonly payload?: unknown
}

/** What `find` returns. */
export interface TaskPage<Result = unknown> {
  readonly records: ReadonlyArray<FoundRecord<Result>>
  /** What goes into `after` to read the records behind these. Undefined if there are none. */
  readonly next?: string
}

/**
 * The app's tasks, outside any request. Each task starts on a later turn of the event loop, in the order added, and does not wait for the
 * others.
 */
export class AppBackgroundTasks implements TaskAdder {
  readonly #intake: Intake

  /** @internal */
  constructor (intake: Intake) {
    this.#intake = intake
  }

  /** @internal */
  static intakeOf (tasks: AppBackgroundTasks): Intake {
    return tasks.#intake
  }

  /** The number of tasks that have not finished yet, tasks of requests included. */
  get length (): number {
    return this.#intake.runner.ledger.unfinished
  }

  /** The app's signal, which aborts at the deadline of a shutdown (`closeTimeout`). Remove the listeners that you add. */
  get signal (): AbortSignal {
    return this.#intake.runner.signal
  }

  /** Counts since the plugin was registered, tasks of requests included. Cleanups do not count. */
  get stats (): TaskStats {
    return this.#intake.runner.stats
  }

  addTask<T extends BackgroundTask | AnyTaskDefinition | TaskFunction>(task: AddedTask<T>, ...args: AddedArgs<T>): BackgroundTask
  addTask<Args extends unknown[]>(fn: TaskFunction<Args>, ...args: Args): BackgroundTask
  addTask (fn: unknown, ...args: unknown[]): BackgroundTask {
    return this.#intake.add(this.#intake.listFor(undefined), fn, args, undefined, undefined)
  }

  /**
   * Sets a name or a timeout for the tasks that are added through what this returns.
   * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value. `when` is refused, because no request and response
   * could decide
   */
  with (options: Omit<TaskOptions, 'when'> & { readonly when?: never }): TaskAdder {
    const checked = checkTaskOptions(options, true)
    return { addTask: (fn: unknown, ...args: unknown[]) => this.#intake.add(this.#intake.listFor(undefined), fn, args, checked, undefined) }
  }

  /**
   * Stores a task immediately, in the caller's transaction if there is a `tx`. Without an engine the task is added to this app.
   * @param args the payload, which may be left out where it may be `undefined`, and {@link EnqueueOptions}
   * @throws FST_BGT_INVALID_TASK if `definition` is no definition
   * @throws FST_BGT_ENGINE_UNAVAILABLE (503) if the engine has not confirmed within `enqueueTimeout` that the task is stored
   * @throws FST_BGT_UNKNOWN_TASK if the definition is not among the app's `tasks`
   * @throws FST_BGT_INVALID_PAYLOAD if the definition's schema refuses the payload, or it is not JSON; the message has path and reason
   * @throws FST_BGT_INVALID_OPTION if an option has a wrong value
   * @throws FST_BGT_UNSUPPORTED for an option that the engine cannot fulfil
   * @throws FST_BGT_OVERLOADED (503) if the task would be added to this app, and `maxPending` tasks have not finished
   * @throws FST_BGT_CLOSED (503) after `app.close()`
   */
  async enqueue<Payload>(definition: TaskDefinition<Payload>, ...args: EnqueueArgs<Payload>): Promise<Receipt> {
    const [payload, options] = args as [unknown, EnqueueOptions | undefined]
    return await enqueue(this.#intake, definition as AnyTaskDefinition, payload, options)
  }

  /**
   * Reads a task of a definition back. Resolves to undefined if there is no task of this id, or if its record is not kept any more
   * (`keep`).
   * @param id the id of a task, a receipt or a delivery
   * @throws FST_BGT_INVALID_TASK if `definition` is no definition, or `id` is no string
   * @throws FST_BGT_UNKNOWN_TASK if the definition is not among the app's `tasks`
   * @throws FST_BGT_UNSUPPORTED if the engine keeps no records
   * @throws FST_BGT_ENGINE_UNAVAILABLE (503) if the engine does not answer within `enqueueTimeout`
   * @throws FST_BGT_CLOSED (503) after `app.close()`
   */
  async get<Payload, Result>(definition: TaskDefinition<Payload, Result>, id: string): Promise<TaskRecord<Result> | undefined> {
    // The result has been through JSON, so dates in it are strings.
    return await get(this.#intake, definition as AnyTaskDefinition, id) as TaskRecord<Result> | undefined
  }

  /**
   * Counts the tasks of a definition by their state, those of all processes together: now, and not since the start as `stats` does.
   * @throws FST_BGT_INVALID_TASK if `definition` is no definition
   * @throws FST_BGT_UNKNOWN_TASK if the definition is not among the app's `tasks`
   * @throws FST_BGT_UNSUPPORTED if the engine cannot count
   * @throws FST_BGT_ENGINE_UNAVAILABLE (503) if the engine does not answer within `enqueueTimeout`
   * @throws FST_BGT_CLOSED (503) after `app.close()`
   */
  async count<Payload> (definition: TaskDefinition<Payload>): Promise<JobCounts> {
    return await count(this.#intake, definition as AnyTaskDefinition)
  }

  /**
   * Reads the records of a definition that have one state, newest first by `enqueuedAt`.
   * @returns the records, and as `next` what goes into `after` to read those behind them. `next` is undefined with the last page
   * @throws FST_BGT_INVALID_TASK if `definition` is no definition
   * @throws FST_BGT_INVALID_OPTION if an option has a wrong value
   * @throws FST_BGT_UNKNOWN_TASK if the definition is not among the app's `tasks`
   * @throws FST_BGT_UNSUPPORTED if the engine cannot search
   * @throws FST_BGT_ENGINE_UNAVAILABLE (503) if the engine does not answer within `enqueueTimeout`
   * @throws FST_BGT_CLOSED (503) after `app.close()`
   */
  async find<Payload, Result> (definition: TaskDefinition<Payload, Result>, options: FindOptions): Promise<TaskPage<Result>> {
    return await find(this.#intake, definition as AnyTaskDefinition, options) as TaskPage<Result>
  }

  /**
   * Starts a task again that has failed for good, with its payload and all its attempts, from 1.
   * @returns whether it will start. False if no task of this id has failed
   * @throws FST_BGT_INVALID_TASK if `definition` is no definition, or `id` is no string
   * @throws FST_BGT_UNKNOWN_TASK if the definition is not among the app's `tasks`
   * @throws FST_BGT_UNSUPPORTED if the engine cannot retry
   * @throws FST_BGT_OVERLOADED (503) if the task would be added to this app, and `maxPending` tasks have not finished
   * @throws FST_BGT_ENGINE_UNAVAILABLE (503) if the engine does not answer within `enqueueTimeout`
   * @throws FST_BGT_CLOSED (503) after `app.close()`
   */
  async retry<Payload> (definition: TaskDefinition<Payload>, id: string): Promise<boolean> {
    return await retry(this.#intake, definition as AnyTaskDefinition, id)
  }

  /**
   * Cancels a task that has not ended: it does not start any more, and its record is `skipped`. If it runs, in whatever process, its signal
   * aborts within 5 s, with `FST_BGT_CANCELLED` as reason. Whatever its handler does after that changes nothing.
   * @returns whether it was cancelled. False if it has ended, or there is no task of this id
   * @throws FST_BGT_INVALID_TASK if `definition` is no definition, or `id` is no string
   * @throws FST_BGT_UNKNOWN_TASK if the definition is not among the app's `tasks`
   * @throws FST_BGT_UNSUPPORTED if the engine cannot cancel
   * @throws FST_BGT_ENGINE_UNAVAILABLE (503) if the engine does not answer within `enqueueTimeout`
   * @throws FST_BGT_CLOSED (503) after `app.close()`
   */
  async cancel<Payload> (definition: TaskDefinition<Payload>, id: string): Promise<boolean> {
    return await cancel(this.#intake, definition as AnyTaskDefinition, id)
  }

  /**
   * Waits until a task has ended, and reads its record. Resolves to undefined if the time is up before that, if there is no task of this id,
   * and when the app closes meanwhile. Any number of waits for one definition share one subscription.
   * @throws FST_BGT_INVALID_TASK if `definition` is no definition, or `id` is no string
   * @throws FST_BGT_INVALID_OPTION if `timeout` is missing or out of range
   * @throws FST_BGT_UNKNOWN_TASK if the definition is not among the app's `tasks`
   * @throws FST_BGT_UNSUPPORTED if the engine keeps no records
   * @throws FST_BGT_ENGINE_UNAVAILABLE (503) if the engine does not answer within `enqueueTimeout`
   * @throws FST_BGT_CLOSED (503) after `app.close()`
   */
  async result<Payload, Result> (definition: TaskDefinition<Payload, Result>, id: string, options: ResultOptions): Promise<TaskRecord<Result> | undefined> {
    return await result(this.#intake, definition as AnyTaskDefinition, id, options) as TaskRecord<Result> | undefined
  }

  /** Whether the engine can be reached, and whose tasks this process runs. For probes. Asks nobody, and never throws. */
  health (): TaskHealth {
    return health(this.#intake)
  }

  /**
   * Resolves when nothing is pending or running. That includes tasks of requests in flight, tasks that tasks have added, and cleanups.
   * Resolves immediately after `app.close()`.
   * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value
   * @throws what a task threw, with `rejectOnFailure`
   */
  async idle (options: IdleOptions = {}): Promise<void> {
    check('idle', options, IDLE_RULES)
    const { failures: kept } = this.#intake.runner.ledger
    const release = options.rejectOnFailure === true ? kept.hold() : undefined
    await this.#intake.runner.idle()
    release?.()
    const failures = kept.take()
    if (options.rejectOnFailure !== true || failures.length === 0) return
    if (failures.length === 1) throw failures[0]
    throw new AggregateError(failures, `${failures.length} background tasks failed`)
  }
}
