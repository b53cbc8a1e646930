import type { FastifyRequest } from 'fastify'
import type { AddedArgs, AddedTask, BackgroundTask, OverloadedArgs, OverloadedFunction, TaskFunction } from './background-task.js'
import type { AnyTaskDefinition } from './define-task.js'
import { Exchange, type ExchangeOutcome } from './exchange.js'
import { checkTaskOptions, type TaskOptions } from './options.js'
import type { Runner } from './runner.js'
import { TaskList } from './task-list.js'

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

/** A request's tasks: they run in the order added, one at a time, once its exchange has ended. */
export class BackgroundTasks implements TaskAdder {
  readonly #list: TaskList
  readonly #exchange: Exchange

  /** @internal */
  constructor (runner: Runner, request: FastifyRequest) {
    this.#list = new TaskList(runner, request, 'waiting')
    if (runner.dispatch !== undefined) this.#list.toStore = []
    // An exchange that has ended says so at once.
    this.#exchange = new Exchange(request, this)
    this.#list.exchange = this.#exchange
  }

  /** Tasks that have not finished yet. */
  get length (): number {
    return this.#list.unfinished
  }

  /** Aborts when the deadline of the drain has passed. It is the app's: remove the listeners that you add. */
  get signal (): AbortSignal {
    return this.#list.runner.signal
  }

  /** How the exchange ended; undefined until it has. */
  get outcome (): ExchangeOutcome | undefined {
    return this.#exchange.outcome
  }

  addTask<T extends BackgroundTask | AnyTaskDefinition | TaskFunction>(task: AddedTask<T>, ...args: AddedArgs<T>): BackgroundTask
  addTask<Args extends unknown[]>(fn: TaskFunction<Args>, ...args: Args): BackgroundTask
  addTask (fn: unknown, ...args: unknown[]): BackgroundTask {
    return this.#list.add(fn, args, undefined)
  }

  /**
   * Options for the tasks added through what it returns, on the same list and in the same order.
   * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value
   */
  with (options: TaskOptions): TaskAdder {
    const list = this.#list
    checkTaskOptions(options, false)
    return { addTask: (fn: unknown, ...args: unknown[]) => list.add(fn, args, options) }
  }

  /**
   * Adds a function that runs when the list has ended, whatever failed or was skipped; the one added last runs first.
   * @throws FST_BGT_INVALID_TASK if it is not a function
   */
  addCleanup<F extends TaskFunction>(fn: OverloadedFunction<F>, ...args: OverloadedArgs<F>): void
  addCleanup<Args extends unknown[]>(fn: TaskFunction<Args>, ...args: Args): void
  addCleanup (fn: unknown, ...args: unknown[]): void {
    this.#list.addCleanup(fn, args)
  }

  /** @internal */
  replyHijacked (): void {
    const { runner } = this.#list
    if (runner.dispatch !== undefined) runner.storeNow(this.#list, this.#exchange.soFar())
  }

  /**
   * Stores what the engine is to have, before the reply goes out. Nothing to wait for, if there is nothing to store.
   * @internal
   */
  storeBeforeReply (): Promise<void> | undefined {
    return this.#list.runner.dispatch?.flush(this.#list, this.#exchange.soFar())
  }

  /** @internal */
  exchangeEnded (): void {
    this.#list.runner.exchangeEnded(this.#list)
  }
}
