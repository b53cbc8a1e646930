/** The types of `addTask`. */
import type { BackgroundTask } from '../tasks/background-task.js'
import type { AnyTaskDefinition, TaskDefinition } from '../definitions/define-task.js'
import type { JobOptions } from '../definitions/jobs.js'
import type { OverloadedArgs, OverloadedFunction, TaskFunction } from '../tasks/task-function.js'

/** Anything that takes tasks: `request.backgroundTasks`, `app.backgroundTasks`, and what their `with()` returns. */
export interface TaskAdder {
  /**
   * Adds a task: a function with its arguments, a definition with its payload and options, or a `BackgroundTask` that was made elsewhere.
   * The payload of a definition is checked, and takes a JSON round trip.
   * @throws FST_BGT_INVALID_TASK if the first argument is none of these, or is a task that was added or run before
   * @throws FST_BGT_OVERLOADED (503) if `maxPending` tasks have not finished
   * @throws FST_BGT_UNKNOWN_TASK if a definition is not among the app's `tasks`
   * @throws FST_BGT_INVALID_PAYLOAD if the definition's schema refuses the payload, or it is not JSON; the message has path and reason
   * @throws FST_BGT_INVALID_OPTION if an option of a definition has a wrong value, or `with()` gives a definition a name
   * @throws FST_BGT_UNSUPPORTED for an option that the engine cannot fulfil
   */
  addTask<T extends BackgroundTask | AnyTaskDefinition | TaskFunction>(task: AddedTask<T>, ...args: AddedArgs<T>): BackgroundTask
  addTask<Args extends unknown[]>(fn: TaskFunction<Args>, ...args: Args): BackgroundTask
}

/** The first argument of `addTask`. A function with one signature has an overload of its own. */
export type AddedTask<T> = T extends BackgroundTask | AnyTaskDefinition ? T : OverloadedFunction<T>

/**
 * The other arguments of `addTask`: the payload and options of a definition, the arguments of a function, and none after a
 * `BackgroundTask`.
 */
export type AddedArgs<T> = T extends BackgroundTask ? [] : T extends TaskDefinition<infer Payload> ? JobArgs<Payload> : OverloadedArgs<T>

/** The arguments of `addTask` after a definition: the payload, which may be left out where it may be `undefined`, and options. */
export type JobArgs<Payload> = undefined extends Payload
  ? [payload?: Payload, options?: JobOptions]
  : [payload: Payload, options?: JobOptions]
