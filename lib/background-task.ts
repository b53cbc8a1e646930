import { AsyncResource } from 'node:async_hooks'
import { randomUUID } from 'node:crypto'
import { inspect } from 'node:util'
import type { AnyTaskDefinition, TaskDefinition } from './define-task.js'
import { FST_BGT_INVALID_TASK, typeOf } from './errors.js'
import type { JobOptions } from './jobs.js'
import type { RunOptions, TaskOptions } from './options.js'
import type { TaskJob } from './task-job.js'

/**
 * - `pending`: waits for its exchange to end, or for its turn
 * - `running`: has started
 * - `succeeded`, `failed`: has run
 * - `skipped`: its `when` did not hold, a failure before it stopped the list, or it was cancelled
 * - `abandoned`: cut off by the deadline of the drain, or added after it
 * - `enqueued`: stored in an engine
 */
export type TaskState = 'pending' | 'running' | 'succeeded' | 'failed' | 'skipped' | 'abandoned' | 'enqueued'

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

/**
 * Names of functions. Reading `name` of one takes as long as a short task, and the tasks of a long list are mostly calls
 * of one function: the last one is remembered, until the list has ended.
 */
export class FunctionNames {
  #fn: TaskFunction | undefined
  #name = ''

  of (fn: TaskFunction | undefined): string {
    if (fn !== this.#fn) {
      this.#name = nameOf(fn)
      this.#fn = fn
    }
    return this.#name
  }

  forget (): void {
    this.#fn = undefined
  }
}

function nameOf (fn: TaskFunction | undefined): string {
  return fn?.name || 'anonymous'
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
  #controller: AbortController | undefined
  /** @internal What `with()` and the definition said. */
  options: RunOptions | undefined
  /** @internal `performance.now()` of the `addTask` call. */
  addedAt = 0

  /**
   * @param fn the function, typed with its arguments
   * @throws FST_BGT_INVALID_TASK if `fn` is not a function
   */
  constructor (fn: OverloadedFunction<F>, ...args: OverloadedArgs<F>)
  constructor (fn: TaskFunction<Args>, ...args: Args)
  constructor (fn: TaskFunction, ...args: unknown[]) {
    if (typeof fn !== 'function') throw invalidTask('new BackgroundTask', fn)
    this.#call = new TaskCall(fn, args)
  }

  /** @internal Takes the array of arguments over: no second one for what `addTask` was given. */
  static of (fn: TaskFunction, args: unknown[]): BackgroundTask {
    const task = new BackgroundTask(fn as TaskFunction<[]>)
    ;(task.#call as TaskCall).args = args
    return task
  }

  /** @internal A task of a definition. */
  static ofJob (job: TaskJob, options: RunOptions): BackgroundTask {
    const task: BackgroundTask = new BackgroundTask(() => job.run(task))
    task.#id = job.origin.id
    task.options = options
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
    if (this.#controller === undefined) {
      this.#controller = new AbortController()
      if (this.#state === 'abandoned') this.#controller.abort()
    }
    return this.#controller.signal
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
      await this.start()
      this.end('succeeded')
    } catch (error) {
      this.end('failed')
      throw error
    }
  }

  /** @internal Puts the task on a list. */
  join (owner: TaskOwner, options: TaskOptions | undefined): void {
    const call = this.#call
    if (call === undefined || call.owner !== undefined || this.#state !== 'pending') throw notFree('addTask', this)
    call.owner = owner
    if (options !== undefined) this.options = options
  }

  /** @internal A task made elsewhere sees the `AsyncLocalStorage` stores of its `addTask` call. */
  recontext (): void {
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
  again (): void {
    this.#state = 'pending'
    this.#controller = undefined
  }

  /**
   * Calls the function in the task's context.
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
   * Ends the task: whoever still holds it holds neither its function and arguments, nor its list and context.
   * @internal
   * @returns the context that was the task's, for what is still to be said about it
   */
  end (state: TaskState, names?: FunctionNames): AsyncResource {
    // It ends once, and has it until then.
    const call = this.#call as TaskCall
    this.#name ??= this.options?.name ?? (names === undefined ? nameOf(call.fn) : names.of(call.fn))
    this.#state = state
    this.#call = undefined
    this.options?.job?.ended(this)
    return call
  }

  /** @internal */
  abort (reason?: unknown): void {
    this.#controller?.abort(reason)
  }
}

/**
 * Says what kind of thing was passed, not what is in it: arguments and payloads do not belong in a log.
 * @internal
 * @param orTask whether a definition and a BackgroundTask are accepted too
 */
export function invalidTask (where: string, value: unknown, orTask = false): Error {
  const accepted = `a function followed by its arguments${orTask ? ', a definition followed by its payload, or a BackgroundTask alone' : ''}`
  const received = orTask && value instanceof BackgroundTask
    ? 'a BackgroundTask followed by arguments: they belong in its constructor'
    : kindOf(value)
  return new FST_BGT_INVALID_TASK(`${where} accepts ${accepted}; received ${received}`)
}

function kindOf (value: unknown): string {
  if (value instanceof BackgroundTask) return 'a BackgroundTask'
  return `${typeOf(value)}: pass the function itself, do not call it`
}

function notFree (where: string, task: BackgroundTask): Error {
  const found = task.state === 'pending' ? 'on a list already' : task.state
  return new FST_BGT_INVALID_TASK(
    `${where} accepts a BackgroundTask once, and none that was run or cancelled; received "${task.name}", which is ${found}`
  )
}
