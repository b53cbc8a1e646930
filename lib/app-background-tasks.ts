import type { AddedArgs, AddedTask, BackgroundTask, TaskFunction } from './background-task.js'
import type { TaskAdder } from './background-tasks.js'
import { checkIdleOptions, checkTaskOptions, type IdleOptions, type TaskOptions } from './options.js'
import type { TaskStats } from './ledger.js'
import type { Runner } from './runner.js'
import { TaskList } from './task-list.js'

/** The app's tasks, outside any request: each starts on a later turn, in the order added, and waits for no other. */
export class AppBackgroundTasks implements TaskAdder {
  readonly #runner: Runner

  /** @internal */
  constructor (runner: Runner) {
    this.#runner = runner
  }

  /** Tasks that have not finished yet, those of requests included. */
  get length (): number {
    return this.#runner.ledger.unfinished
  }

  /** Aborts when the deadline of the drain has passed. Remove the listeners that you add. */
  get signal (): AbortSignal {
    return this.#runner.signal
  }

  /** Counts since the plugin was registered, those of requests included. Cleanups do not count. */
  get stats (): TaskStats {
    return this.#runner.stats
  }

  addTask<T extends BackgroundTask | TaskFunction>(task: AddedTask<T>, ...args: AddedArgs<T>): BackgroundTask
  addTask<Args extends unknown[]>(fn: TaskFunction<Args>, ...args: Args): BackgroundTask
  addTask (fn: unknown, ...args: unknown[]): BackgroundTask {
    return new TaskList(this.#runner, undefined, 'ended').add(fn, args, undefined)
  }

  /**
   * A name or timeout for the tasks added through what it returns.
   * @throws FST_BGT_INVALID_OPTION, also for `when`: there is no exchange to ask
   */
  with (options: Omit<TaskOptions, 'when'> & { readonly when?: never }): TaskAdder {
    const runner = this.#runner
    checkTaskOptions(options, true)
    return { addTask: (fn: unknown, ...args: unknown[]) => new TaskList(runner, undefined, 'ended').add(fn, args, options) }
  }

  /**
   * Resolves when nothing is pending or running: tasks of requests in flight, tasks added by tasks, and cleanups included.
   * After `app.close()` it resolves at once.
   * @throws FST_BGT_INVALID_OPTION
   */
  async idle (options: IdleOptions = {}): Promise<void> {
    checkIdleOptions(options)
    await this.#runner.idle()
    const failures = this.#runner.ledger.takeFailures()
    if (options.rejectOnFailure !== true || failures.length === 0) return
    if (failures.length === 1) throw failures[0]
    throw new AggregateError(failures, `${failures.length} background tasks failed`)
  }
}
