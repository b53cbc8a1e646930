import type { FastifyRequest } from 'fastify'
import type { BackgroundTask } from '../tasks/background-task.js'
import type { AnyTaskDefinition } from '../definitions/define-task.js'
import type { Exchange } from '../exchange/exchange.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import { openExchange } from '../exchange/watch.js'
import { checkTaskOptions, type TaskOptions } from '../options.js'
import { FST_BGT_CLOSED } from '../errors.js'
import type { Runner } from '../runner/runner.js'
import type { AddedArgs, AddedTask, OverloadedArgs, OverloadedFunction, TaskAdder, TaskFunction } from './task-adder.js'
import { TaskList } from '../tasks/task-list.js'

/** A request's tasks: they run in the order added, one at a time, once its exchange has ended. */
export class BackgroundTasks implements TaskAdder {
  readonly #list: TaskList
  readonly #exchange: Exchange

  /** @internal */
  constructor (runner: Runner, request: FastifyRequest) {
    this.#list = new TaskList(runner, request, 'waiting')
    if (runner.dispatch !== undefined) this.#list.toStore = []
    this.#exchange = openExchange(request, this)
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
    const checked = checkTaskOptions(options, false)
    return { addTask: (fn: unknown, ...args: unknown[]) => list.add(fn, args, checked) }
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
  exchangeOpened (exchange: Exchange): void {
    this.#list.exchange = exchange
  }

  /** @internal */
  replyHijacked (): void {
    const { runner } = this.#list
    if (runner.dispatch !== undefined) runner.storeNow(this.#list, this.#exchange.currentOutcome())
  }

  /**
   * Stores what the engine is to have, before the reply goes out. Nothing to wait for, if there is nothing to store.
   * @internal
   */
  storeBeforeReply (): Promise<void> | undefined {
    const list = this.#list
    // The usual list, of functions.
    if (!list.hasPromises) {
      list.toStore = undefined
      return undefined
    }
    const outcome = this.#exchange.currentOutcome()
    const storing = list.runner.dispatch?.flush(list, outcome)
    return list.takeBroken(outcome) ? Promise.reject(new FST_BGT_CLOSED('addTask')) : storing
  }

  /** @internal */
  exchangeEnded (): void {
    this.#list.runner.exchangeEnded(this.#list)
  }
}
