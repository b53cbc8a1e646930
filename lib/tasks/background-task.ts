import { AsyncResource } from 'node:async_hooks'
import { randomUUID } from 'node:crypto'
import { inspect } from 'node:util'
import { FST_BGT_INVALID_TASK, markOurs, typeOf } from '../errors.js'
import { adopt, isFunction, isInstance, isNative } from '../foreign.js'
import { nameOf, type LastFunction } from './last-function.js'
import type { OverloadedArgs, OverloadedFunction, TaskFunction } from './task-function.js'
import type { AddedOptions } from './task-options.js'

/**
 * What has become of a task:
 * - `pending`: waits for its exchange to end, for its turn, or for its next attempt
 * - `running`: has started
 * - `succeeded`, `failed`: has ended
 * - `skipped`: its `when` did not hold, a failure before it stopped the list, another task of its key was first, or it was cancelled
 * - `abandoned`: cut off by the deadline of a shutdown, or added after it
 * - `enqueued`: stored in an engine, or returned to it; the job's own state there is in the record that `get` reads
 */
export type TaskState = 'pending' | 'running' | 'succeeded' | 'failed' | 'skipped' | 'abandoned' | 'enqueued'

/** A placeholder in the place of a function, for {@link BackgroundTask.of}. */
const checkedAlready = Symbol('checked already') as unknown as TaskFunction<[]>

/** What a log line tells of a task. The arguments are never part of it. */
export interface TaskBindings {
  readonly id: string
  readonly name: string
  /** The number of the attempt. Only a task of a definition has one. */
  readonly attempt?: number
}

/** What a task lets go when it has ended: its function with its arguments, its list, and the context of its `addTask` call. */
class TaskCall extends AsyncResource {
  readonly fn: TaskFunction
  args: unknown[]
  owner: TaskOwner | undefined

  constructor (fn: TaskFunction, args: unknown[]) {
    super('BackgroundTask')
    this.fn = fn
    this.args = args
  }
}

/** The list that a task is on, as far as the task knows it. */
export interface TaskOwner {
  taskCancelled: (task: BackgroundTask) => void
  /** The task that runs is to be skipped. Its signal aborts with this reason. */
  taskCutOff: (task: BackgroundTask, reason: unknown) => void
}

/**
 * A function with its arguments, and what has become of it. `addTask` makes and returns a task. A task that is made by hand is added with
 * `addTask(task)`, or run with `run()`.
 */
export class BackgroundTask<Args extends unknown[] = unknown[], F extends TaskFunction = TaskFunction> {
  #state: TaskState = 'pending'
  /** The function and what belongs to it, until the task has ended. */
  #call: TaskCall | undefined
  #name: string | undefined
  #id: string | undefined
  /**
   * The controller of the signal, if somebody has read the signal. Otherwise the reason why the signal would have aborted, if there is one.
   */
  #signal: AbortController | { readonly reason: unknown } | undefined
  /** @internal The options of `with()` and of the definition. Undefined after the end. */
  options: AddedOptions | undefined
  /** @internal `performance.now()` of the `addTask` call. */
  addedAt = 0

  /**
   * @param fn the function, typed with its arguments
   * @throws FST_BGT_INVALID_TASK if `fn` is not a function
   */
  constructor (fn: OverloadedFunction<F>, ...args: OverloadedArgs<F>)
  constructor (fn: TaskFunction<Args>, ...args: Args)
  constructor (fn: TaskFunction, ...args: unknown[]) {
    if (fn === checkedAlready) return
    if (!isFunction(fn)) throw invalidTask('new BackgroundTask', fn)
    this.#call = new TaskCall(fn, args)
  }

  /** @internal Makes a task of a function that was checked. The task keeps the array of arguments, which nobody else may have. */
  static of (fn: TaskFunction, args: unknown[]): BackgroundTask {
    const task = new BackgroundTask(checkedAlready)
    task.#call = new TaskCall(fn, args)
    return task
  }

  /** A UUID. A task of a definition that has a `key` always has the same one for that key. */
  get id (): string {
    this.#id ??= randomUUID()
    return this.#id
  }

  /** The name of the definition. For a function, the name that `with()` gave, else the function's own, else `'anonymous'`. */
  get name (): string {
    this.#name ??= this.options?.name ?? nameOf(this.#call?.fn)
    return this.#name
  }

  /** What has become of the task so far. */
  get state (): TaskState {
    return this.#state
  }

  /** What a reply or a log may tell of the task. The arguments are never part of it. */
  toJSON (): { id: string, name: string, state: TaskState } {
    const { id, name, state } = this
    return { id, name, state }
  }

  /** @internal */
  toBindings (): TaskBindings {
    const { id, name } = this
    return { id, name }
  }

  /** @internal */
  [inspect.custom] (): string {
    return `BackgroundTask ${inspect(this.toJSON())}`
  }

  /** @internal The arguments of its function. */
  get args (): readonly unknown[] {
    // This is read when the task is added, and a task that has not ended has its call.
    return (this.#call as TaskCall).args
  }

  /** Aborts at the task's timeout, with `FST_BGT_TIMEOUT` as reason, and at the deadline of a shutdown. The signal is made on first read. */
  get signal (): AbortSignal {
    const known = this.#signal
    if (known instanceof AbortController) return known.signal
    const controller = new AbortController()
    this.#signal = controller
    if (known !== undefined) controller.abort(known.reason)
    return controller.signal
  }

  /**
   * Skips the task if it is pending. Does nothing once the task has started or ended.
   * @returns whether the task was skipped
   */
  cancel (): boolean {
    if (this.#state !== 'pending') return false
    const owner = this.#call?.owner
    this.end('skipped')
    owner?.taskCancelled(this)
    return true
  }

  /**
   * Skips the task while it runs, and aborts its signal. Must not be called by the function of the task before that has returned.
   * @internal
   * @returns whether the task was skipped
   */
  cutOff (reason: unknown): boolean {
    const owner = this.#call?.owner
    if (this.#state !== 'running' || owner === undefined) return false
    owner.taskCutOff(this, reason)
    return true
  }

  /**
   * Runs the task by hand, outside any list. Rejects with the task's error.
   * @throws FST_BGT_INVALID_TASK if the task is on a list, or was run or cancelled before
   */
  async run (): Promise<void> {
    if (this.#call?.owner !== undefined || this.#state !== 'pending') throw notFree('run', this)
    try {
      this.begin()
      await this.promiseOf(this.start())
      this.end('succeeded')
    } catch (error) {
      this.end('failed')
      throw error
    }
  }

  /** @internal Puts the task on a list. */
  attachTo (owner: TaskOwner, options: AddedOptions | undefined): void {
    const call = this.#call
    if (call === undefined || call.owner !== undefined || this.#state !== 'pending') throw notFree('addTask', this)
    call.owner = owner
    if (options !== undefined) this.options = options
  }

  /** @internal Gives a task that was made elsewhere the `AsyncLocalStorage` stores of its `addTask` call. */
  captureContext (): void {
    // A task that can be added has its call.
    const { fn, args, owner } = this.#call as TaskCall
    this.#call = new TaskCall(fn, args)
    this.#call.owner = owner
  }

  /** @internal */
  begin (): void {
    this.#state = 'running'
  }

  /** @internal Makes the task pending again. The next attempt has its own signal. */
  resetForRetry (): void {
    this.#state = 'pending'
    this.#signal = undefined
  }

  /**
   * Calls the function in the task's context. What the function returns is somebody else's value, see {@link promiseOf}.
   * @internal
   * @param around is given a function that makes the call, and has to call it
   */
  start (around?: (call: () => unknown) => unknown): unknown {
    // A task that has not ended has its call. The arguments fit the function, because the types of the constructor say so.
    const call = this.#call as TaskCall
    const fn = call.fn as (...args: unknown[]) => unknown
    const { args } = call
    if (around !== undefined) return call.runInAsyncScope(around, undefined, () => fn(...args))
    // Most tasks have one argument, and need no spread.
    if (args.length === 1) return call.runInAsyncScope(fn, undefined, args[0])
    return call.runInAsyncScope(fn, undefined, ...args)
  }

  /**
   * The promise of what the function has returned, or undefined if that need not be waited for.
   * @internal
   */
  promiseOf (result: unknown): Promise<unknown> | undefined {
    if ((typeof result !== 'object' || result === null) && typeof result !== 'function') return undefined
    const { then } = result as { then?: unknown }
    if (isNative(then)) return result as Promise<unknown>
    if (typeof then !== 'function') return undefined
    // A lazy thenable, such as a query builder, starts its work in its `then`, which therefore runs in the task's context too.
    return (this.#call as TaskCall).runInAsyncScope(adopt, undefined, result, then)
  }

  /**
   * Ends the task. After that it holds neither its function and arguments, nor its list and context.
   * @internal
   * @returns the context that the task had, in which its end is reported
   */
  end (state: TaskState, last?: LastFunction): AsyncResource {
    // A task ends once, and has its call until then.
    const call = this.#call as TaskCall
    this.#name ??= this.options?.name ?? (last === undefined ? nameOf(call.fn) : last.nameOf(call.fn))
    this.#state = state
    this.#call = undefined
    // Most tasks have neither a signal nor options.
    if (this.#signal !== undefined) this.#letSignalGo(this.#signal)
    // The options may have a condition, which is a closure of somebody else's.
    if (this.options !== undefined) this.options = undefined
    return call
  }

  /** @internal Aborts the signal, if there is one. Its listeners run immediately. */
  abort (reason?: unknown): void {
    const known = this.#signal
    if (known instanceof AbortController) known.abort(reason)
    if (this.#call === undefined || known === undefined) this.#signal = { reason }
  }

  /** Lets go the signal, because its listeners are closures of somebody else's. */
  #letSignalGo (known: AbortController | { readonly reason: unknown }): void {
    // The signal of a task that is cut off is about to abort, and is let go then.
    if (this.#state === 'abandoned' || this.#state === 'enqueued' || !(known instanceof AbortController)) return
    const { signal } = known
    this.#signal = signal.aborted ? { reason: signal.reason } : undefined
  }
}

markOurs(BackgroundTask.prototype)

/**
 * The error for a value that is no task. Its message tells the kind of the value and not its contents, because arguments and payloads do
 * not belong in a log.
 * @internal
 * @param orTask whether a definition and a BackgroundTask are accepted too
 */
export function invalidTask (where: string, value: unknown, orTask = false): Error {
  const accepted = `a function followed by its arguments${orTask ? ', a definition followed by its payload, or a BackgroundTask alone' : ''}`
  const received = orTask && isInstance(value, BackgroundTask)
    ? 'a BackgroundTask followed by arguments: they belong in its constructor'
    : kindOf(value)
  return new FST_BGT_INVALID_TASK(`${where} accepts ${accepted}; received ${received}`)
}

function kindOf (value: unknown): string {
  if (isInstance(value, BackgroundTask)) return 'a BackgroundTask'
  const type = typeOf(value)
  if (typeof value === 'function') return `${type}, a generator function: calling one runs nothing`
  return type.includes('another copy') ? type : `${type}: pass the function itself, do not call it`
}

function notFree (where: string, task: BackgroundTask): Error {
  const found = task.state === 'pending' ? 'on a list already' : task.state
  return new FST_BGT_INVALID_TASK(
    `${where} accepts a BackgroundTask once, and none that was run or cancelled; received "${task.name}", which is ${found}`
  )
}
