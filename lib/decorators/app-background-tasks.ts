import type { BackgroundTask } from '../tasks/background-task.js'
import type { AnyTaskDefinition, TaskDefinition } from '../definitions/define-task.js'
import { enqueue, get, type EnqueueArgs, type EnqueueOptions } from './enqueue.js'
import type { JobRecord, Receipt } from '../engines/engine.js'
import { BOOLEAN, check, type Rules } from '../rules.js'
import type { TaskFunction } from '../tasks/task-function.js'
import { checkTaskOptions, type TaskOptions } from '../tasks/task-options.js'
import type { TaskStats } from '../runner/ledger.js'
import type { AddedArgs, AddedTask, TaskAdder } from './task-adder.js'
import type { Intake } from './intake.js'

export type { EnqueueOptions }

/** Options of `app.backgroundTasks.idle()`. */
export interface IdleOptions {
  /**
   * Whether to reject with what a task threw since the last `idle()` returned, or since the plugin was registered; with an
   * `AggregateError` when there are several (of the first 100). An error that was thrown before anybody waited may have been collected as
   * garbage: then it is a new one, of the same name and with the message.
   * @default false
   */
  readonly rejectOnFailure?: boolean | undefined
}

const IDLE_RULES: Rules = { rejectOnFailure: BOOLEAN }

/** A task read back, with what its handler returned. */
export interface TaskRecord<Result = unknown> extends Omit<JobRecord, 'result'> {
  /** What the handler returned, as JSON, of a task that has `succeeded`. */
  readonly result?: Result
}

/** The app's tasks, outside any request: each starts on a later turn, in the order added, and waits for no other. */
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

  /** Tasks that have not finished yet, those of requests included. */
  get length (): number {
    return this.#intake.runner.ledger.unfinished
  }

  /** Aborts when the deadline of the drain has passed. Remove the listeners that you add. */
  get signal (): AbortSignal {
    return this.#intake.runner.signal
  }

  /** Counts since the plugin was registered, those of requests included. Cleanups do not count. */
  get stats (): TaskStats {
    return this.#intake.runner.stats
  }

  addTask<T extends BackgroundTask | AnyTaskDefinition | TaskFunction>(task: AddedTask<T>, ...args: AddedArgs<T>): BackgroundTask
  addTask<Args extends unknown[]>(fn: TaskFunction<Args>, ...args: Args): BackgroundTask
  addTask (fn: unknown, ...args: unknown[]): BackgroundTask {
    return this.#intake.add(this.#intake.listFor(undefined), fn, args, undefined, undefined)
  }

  /**
   * A name or timeout for the tasks added through what it returns.
   * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value; `when` is none here, for there is no exchange to ask
   */
  with (options: Omit<TaskOptions, 'when'> & { readonly when?: never }): TaskAdder {
    const checked = checkTaskOptions(options, true)
    return { addTask: (fn: unknown, ...args: unknown[]) => this.#intake.add(this.#intake.listFor(undefined), fn, args, checked, undefined) }
  }

  /**
   * Stores a task now, in the caller's transaction where the engine has one. Without an engine it is added to this app.
   * @param args the payload, which may be left out where it may be `undefined`, and {@link EnqueueOptions}
   * @throws FST_BGT_INVALID_TASK if it is no definition
   * @throws FST_BGT_ENGINE_UNAVAILABLE (503) if it is not known to be stored within `enqueueTimeout`
   * @throws FST_BGT_UNKNOWN_TASK if the definition is not among the app's `tasks`
   * @throws FST_BGT_INVALID_PAYLOAD with path and reason
   * @throws FST_BGT_INVALID_OPTION if an option has a wrong value
   * @throws FST_BGT_UNSUPPORTED for an option that the engine cannot fulfil
   * @throws FST_BGT_OVERLOADED (503) if it would be added here, and `maxPending` tasks have not finished
   * @throws FST_BGT_CLOSED (503) after `app.close()`
   */
  async enqueue<Payload>(definition: TaskDefinition<Payload>, ...args: EnqueueArgs<Payload>): Promise<Receipt> {
    const [payload, options] = args as [unknown, EnqueueOptions | undefined]
    return await enqueue(this.#intake, definition as AnyTaskDefinition, payload, options)
  }

  /**
   * Reads a task of a definition back; undefined if there is none of this id, or its record has gone (`keep`).
   * @param id of a task, a receipt or a delivery
   * @throws FST_BGT_INVALID_TASK if it is no definition, or there is no id
   * @throws FST_BGT_UNKNOWN_TASK if the definition is not among the app's `tasks`
   * @throws FST_BGT_UNSUPPORTED if the engine keeps no records
   * @throws FST_BGT_ENGINE_UNAVAILABLE (503) if it does not answer
   * @throws FST_BGT_CLOSED (503) after `app.close()`
   */
  async get<Payload, Result>(definition: TaskDefinition<Payload, Result>, id: string): Promise<TaskRecord<Result> | undefined> {
    // The result went through JSON on its way: dates in it are strings.
    return await get(this.#intake, definition as AnyTaskDefinition, id) as TaskRecord<Result> | undefined
  }

  /**
   * Resolves when nothing is pending or running: tasks of requests in flight, tasks added by tasks, and cleanups included.
   * After `app.close()` it resolves at once.
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
