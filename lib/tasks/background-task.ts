import { AsyncResource } from 'node:async_hooks'
import { randomUUID } from 'node:crypto'
import { inspect } from 'node:util'
import type { FastifyBaseLogger } from 'fastify'
import { FST_BGT_INVALID_TASK, markOurs, typeOf } from '../errors.js'
import { adopt, isFunction, isInstance, isNative } from '../foreign.js'
import { nameOf, type LastFunction } from './last-function.js'
import type { OverloadedArgs, OverloadedFunction, TaskFunction } from './task-function.js'
import type { AddedOptions } from './task-options.js'

/**
 * - `pending`: waits for its exchange to end, or for its turn
 * - `running`: has started
 * - `succeeded`, `failed`: has run
 * - `skipped`: its `when` did not hold, a failure before it stopped the list, or it was cancelled
 * - `abandoned`: cut off by the deadline of the drain, or added after it
 * - `enqueued`: stored in an engine
 */
export type TaskState = 'pending' | 'running' | 'succeeded' | 'failed' | 'skipped' | 'abandoned' | 'enqueued'

/** In the place of a function, for {@link BackgroundTask.of}. */
const checkedAlready = (): void => {}

/** What a log line says of a task: never its arguments. */
export interface TaskBindings {
  readonly id: string
  readonly name: string
  /** Of a task of a definition. */
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

/** The list that a task is on, as the task knows it. */
export interface TaskOwner {
  taskCancelled: (task: BackgroundTask) => void
}

/**
 * A function with its arguments, and what became of it. `addTask` makes and returns one; one made by hand is added with
 * `addTask(task)`, or run with `run()`.
 */
export class BackgroundTask<Args extends unknown[] = unknown[], F extends TaskFunction = TaskFunction> {
  #state: TaskState = 'pending'
  /** Until the task has ended. */
  #call: TaskCall | undefined
  #name: string | undefined
  #id: string | undefined
  /** The controller of the signal, if that was asked for; or why the signal would have aborted. */
  #signal: AbortController | { readonly reason: unknown } | undefined
  /** @internal What `with()` and the definition said; none after the end. */
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

  /** @internal A function that was checked, with an array of arguments that nobody else has: `addTask` makes no second one. */
  static of (fn: TaskFunction, args: unknown[]): BackgroundTask {
    const task = new BackgroundTask(checkedAlready)
    task.#call = new TaskCall(fn, args)
    return task
  }

  /** A UUID; of a definition's task with a `key`, always the same one for that key. */
  get id (): string {
    this.#id ??= randomUUID()
    return this.#id
  }

  /** The definition's name; of a function the one given by `with()`, else its own, else `'anonymous'`. */
  get name (): string {
    this.#name ??= this.options?.name ?? nameOf(this.#call?.fn)
    return this.#name
  }

  /** What has become of it so far. */
  get state (): TaskState {
    return this.#state
  }

  /** For a reply or a log: never its arguments. */
  toJSON (): { id: string, name: string, state: TaskState } {
    const { id, name, state } = this
    return { id, name, state }
  }

  /** @internal */
  toBindings (): TaskBindings {
    const { id, name } = this
    return { id, name }
  }

  /** @internal The logger that the task brings along. */
  get log (): FastifyBaseLogger | undefined {
    return undefined
  }

  /** @internal */
  [inspect.custom] (): string {
    return `BackgroundTask ${inspect(this.toJSON())}`
  }

  /** @internal Those of its function. */
  get args (): readonly unknown[] {
    // Asked for when it is added.
    return (this.#call as TaskCall).args
  }

  /** Aborts at the task's timeout, with `FST_BGT_TIMEOUT` as reason, and at the deadline of the drain. Made on first read. */
  get signal (): AbortSignal {
    const known = this.#signal
    if (known instanceof AbortController) return known.signal
    const controller = new AbortController()
    this.#signal = controller
    if (known !== undefined) controller.abort(known.reason)
    return controller.signal
  }

  /** Skips the task while it is pending. False, and nothing happens, once it has started or ended. */
  cancel (): boolean {
    if (this.#state !== 'pending') return false
    const owner = this.#call?.owner
    this.end('skipped')
    owner?.taskCancelled(this)
    return true
  }

  /**
   * Runs the task by hand, outside any list. Rejects with the task's error.
   * @throws FST_BGT_INVALID_TASK if it is on a list, or was run before
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

  /** @internal A task made elsewhere sees the `AsyncLocalStorage` stores of its `addTask` call. */
  captureContext (): void {
    // One that can be added has them.
    const { fn, args, owner } = this.#call as TaskCall
    this.#call = new TaskCall(fn, args)
    this.#call.owner = owner
  }

  /** @internal */
  begin (): void {
    this.#state = 'running'
  }

  /** @internal The next attempt has its own signal. */
  resetForRetry (): void {
    this.#state = 'pending'
    this.#signal = undefined
  }

  /**
   * Calls the function in the task's context. What it returns is a stranger's: see {@link promiseOf}.
   * @internal
   * @param around is given the call, and makes it
   */
  start (around?: (call: () => unknown) => unknown): unknown {
    // A task that has not ended has one, and its arguments fit its function: its constructor is typed so.
    const call = this.#call as TaskCall
    const fn = call.fn as (...args: unknown[]) => unknown
    const { args } = call
    if (around !== undefined) return call.runInAsyncScope(around, undefined, () => fn(...args))
    // The usual task, without a spread.
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
    // A lazy thenable, such as a query builder, starts its work in its `then`: in the task's context, too.
    return (this.#call as TaskCall).runInAsyncScope(adopt, undefined, result, then)
  }

  /**
   * Ends the task: whoever still holds it holds neither its function and arguments, nor its list and context.
   * @internal
   * @returns the context that was the task's, for what is still to be said about it
   */
  end (state: TaskState, last?: LastFunction): AsyncResource {
    // It ends once, and has it until then.
    const call = this.#call as TaskCall
    this.#name ??= this.options?.name ?? (last === undefined ? nameOf(call.fn) : last.nameOf(call.fn))
    this.#state = state
    this.#call = undefined
    // The usual task has neither.
    if (this.#signal !== undefined) this.#letSignalGo(this.#signal)
    // Conditions are closures of somebody else's.
    if (this.options !== undefined) this.options = undefined
    return call
  }

  /** @internal Its listeners run now. */
  abort (reason?: unknown): void {
    const known = this.#signal
    if (known instanceof AbortController) known.abort(reason)
    if (this.#call === undefined || known === undefined) this.#signal = { reason }
  }

  /** Its listeners are closures of somebody else's. */
  #letSignalGo (known: AbortController | { readonly reason: unknown }): void {
    // A task that is cut off is told so in a moment, and lets its signal go then.
    if (this.#state === 'abandoned' || this.#state === 'enqueued' || !(known instanceof AbortController)) return
    const { signal } = known
    this.#signal = signal.aborted ? { reason: signal.reason } : undefined
  }
}

markOurs(BackgroundTask.prototype)

/**
 * Says what kind of thing was passed, not what is in it: arguments and payloads do not belong in a log.
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
