/** The types of `addTask`. */
import type { BackgroundTask } from '../tasks/background-task.js'
import type { AnyTaskDefinition, TaskDefinition } from '../definitions/define-task.js'
import type { JobOptions } from '../definitions/jobs.js'
import type { OverloadedArgs, OverloadedFunction, TaskFunction } from '../tasks/task-function.js'

/** What takes tasks: a request's list, the app, and either of them `with()` options. */
export interface TaskAdder {
  /**
   * Adds a function with its arguments; a definition with its payload, which is checked and takes a JSON round trip, and options; or
   * a task made elsewhere.
   * @throws FST_BGT_INVALID_TASK if it is none of them, or a task that was added or run before
   * @throws FST_BGT_OVERLOADED (503) if `maxPending` tasks have not finished
   * @throws FST_BGT_UNKNOWN_TASK if a definition is not among the app's `tasks`
   * @throws FST_BGT_INVALID_PAYLOAD with path and reason
   * @throws FST_BGT_INVALID_OPTION if an option of a definition has a wrong value, or `with()` gives a definition a name
   * @throws FST_BGT_UNSUPPORTED for an option that the engine cannot fulfil
   */
  addTask<T extends BackgroundTask | AnyTaskDefinition | TaskFunction>(task: AddedTask<T>, ...args: AddedArgs<T>): BackgroundTask
  addTask<Args extends unknown[]>(fn: TaskFunction<Args>, ...args: Args): BackgroundTask
}

/** What `addTask` takes first, beside a function with one signature. */
export type AddedTask<T> = T extends BackgroundTask | AnyTaskDefinition ? T : OverloadedFunction<T>

/** What `addTask` takes second: a definition's payload and options, nothing after a `BackgroundTask`. */
export type AddedArgs<T> = T extends BackgroundTask ? [] : T extends TaskDefinition<infer Payload> ? JobArgs<Payload> : OverloadedArgs<T>

/** What `addTask` takes after a definition: the payload, which may be left out where it may be `undefined`, and options. */
export type JobArgs<Payload> = undefined extends Payload
  ? [payload?: Payload, options?: JobOptions]
  : [payload: Payload, options?: JobOptions]
