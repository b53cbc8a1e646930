/** The types of `addTask`. */
import type { BackgroundTask } from '../tasks/background-task.js'
import type { AnyTaskDefinition, TaskDefinition } from '../definitions/define-task.js'
import type { JobOptions } from '../definitions/jobs.js'

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

/** A function that can be a task: synchronous, or returning a promise. */
export type TaskFunction<Args extends unknown[] = never[]> = (...args: Args) => unknown

/** What `addTask` takes first, beside a function with one signature. */
export type AddedTask<T> = T extends BackgroundTask | AnyTaskDefinition ? T : OverloadedFunction<T>

/** What `addTask` takes behind it: a definition's payload and options, nothing behind a `BackgroundTask`. */
export type AddedArgs<T> = T extends BackgroundTask ? [] : T extends TaskDefinition<infer Payload> ? JobArgs<Payload> : OverloadedArgs<T>

/** What `addTask` takes behind a definition: the payload, which may be left out where it may be `undefined`, and options. */
export type JobArgs<Payload> = undefined extends Payload
  ? [payload?: Payload, options?: JobOptions]
  : [payload: Payload, options?: JobOptions]

/** `F` if it has several signatures, else `never`: the arguments of a function with one are inferred from `TaskFunction`. */
export type OverloadedFunction<F> = Signatures<F> extends [infer First, ...unknown[], infer Last]
  ? [First, Last] extends [Last, First] ? never : F
  : never

/** The arguments of an overloaded function: those of any of its signatures, of the last eight. */
export type OverloadedArgs<F> = Signatures<F>[number]

/** TypeScript matches signatures from the last to the first, and repeats the first where a function has fewer. */
type Signatures<F> = F extends {
  (...args: infer A extends unknown[]): unknown
  (...args: infer B extends unknown[]): unknown
  (...args: infer C extends unknown[]): unknown
  (...args: infer D extends unknown[]): unknown
  (...args: infer E extends unknown[]): unknown
  (...args: infer G extends unknown[]): unknown
  (...args: infer H extends unknown[]): unknown
  (...args: infer I extends unknown[]): unknown
}
  ? [A, B, C, D, E, G, H, I]
  : never
