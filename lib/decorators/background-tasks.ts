import type { FastifyRequest } from 'fastify'
import type { AnyTaskDefinition } from '../definitions/define-task.js'
import type { DefinedTask } from '../definitions/defined-task.js'
import type { Dispatch } from '../dispatch/dispatch.js'
import { FST_BGT_CLOSED } from '../errors.js'
import type { Exchange } from '../exchange/exchange.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import { openExchange } from '../exchange/watch.js'
import { isThenable, readOr } from '../foreign.js'
import type { BackgroundTask } from '../tasks/background-task.js'
import type { OverloadedArgs, OverloadedFunction, TaskFunction } from '../tasks/task-function.js'
import type { TaskList } from '../tasks/task-list.js'
import { checkTaskOptions, type TaskCondition, type TaskOptions } from '../tasks/task-options.js'
import type { Intake } from './intake.js'
import type { AddedArgs, AddedTask, TaskAdder } from './task-adder.js'

/** A task of a definition that was added before the reply went out. */
interface Promised {
  readonly task: DefinedTask
  /** The task's condition, which is kept here because a task that has ended has no options any more. */
  readonly when: TaskCondition
  /** The way to the engine that is to store the task. Undefined if the task runs here. */
  readonly dispatch: Dispatch | undefined
}

/** A request's tasks. They run in the order added, one at a time, after the exchange (the request and its response) has ended. */
export class BackgroundTasks implements TaskAdder {
  readonly #intake: Intake
  readonly #list: TaskList
  /**
   * The exchange calls `exchangeOpened`, which sets this, while the constructor opens it. An exchange that is over already may end
   * immediately.
   */
  #exchange!: Exchange
  /** Tasks of definitions that the reply promises, until it goes out. */
  #promised: Promised[] | undefined
  #hasReplied = false

  /** @internal */
  constructor (intake: Intake, request: FastifyRequest) {
    this.#intake = intake
    this.#list = intake.listFor(request)
    openExchange(request, this)
  }

  /** The number of tasks that have not finished yet. */
  get length (): number {
    return this.#list.unfinished
  }

  /** The app's signal, which aborts at the deadline of a shutdown (`closeTimeout`). Remove the listeners that you add. */
  get signal (): AbortSignal {
    return this.#intake.runner.signal
  }

  /** How the exchange ended. Undefined until then. */
  get outcome (): ExchangeOutcome | undefined {
    return this.#exchange.outcome
  }

  addTask<T extends BackgroundTask | AnyTaskDefinition | TaskFunction>(task: AddedTask<T>, ...args: AddedArgs<T>): BackgroundTask
  addTask<Args extends unknown[]>(fn: TaskFunction<Args>, ...args: Args): BackgroundTask
  addTask (fn: unknown, ...args: unknown[]): BackgroundTask {
    return this.#intake.add(this.#list, fn, args, undefined, this)
  }

  /**
   * Sets options for the tasks that are added through what this returns, on the same task list and in the same order.
   * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value
   */
  with (options: TaskOptions): TaskAdder {
    const checked = checkTaskOptions(options, false)
    return { addTask: (fn: unknown, ...args: unknown[]) => this.#intake.add(this.#list, fn, args, checked, this) }
  }

  /**
   * Adds a function that runs when all tasks of the list have ended, whatever failed or was skipped. The function that was added last runs
   * first.
   * @throws FST_BGT_INVALID_TASK if `fn` is not a function
   */
  addCleanup<F extends TaskFunction>(fn: OverloadedFunction<F>, ...args: OverloadedArgs<F>): void
  addCleanup<Args extends unknown[]>(fn: TaskFunction<Args>, ...args: Args): void
  addCleanup (fn: unknown, ...args: unknown[]): void {
    this.#intake.addCleanup(this.#list, fn, args)
  }

  /** @internal */
  promise (task: DefinedTask, dispatch: Dispatch | undefined): boolean {
    if (this.#hasReplied) return false
    this.#promised ??= []
    this.#promised.push({ task, when: this.#intake.runner.conditionOf(task), dispatch })
    return true
  }

  /** @internal */
  exchangeOpened (exchange: Exchange): void {
    this.#exchange = exchange
    this.#list.attachExchange(exchange)
  }

  /** @internal The reply was hijacked, so it will not pass `onSend`. */
  replyHijacked (): void {
    this.#storeUnawaited(this.#exchange.currentOutcome())
  }

  /**
   * Stores the tasks that the reply promises, before the reply goes out. Returns undefined if there is nothing to store.
   * @internal
   * @throws FST_BGT_CLOSED if a task was abandoned meanwhile
   */
  storeBeforeReply (): Promise<void> | undefined {
    const promised = this.#takePromised()
    if (promised === undefined) return undefined
    const outcome = this.#exchange.currentOutcome()
    const storing = this.#store(promised, outcome)
    if (!promised.some(({ task, when }) => task.state === 'abandoned' && wouldRun(when, outcome))) return storing
    storing?.catch(() => {})
    return Promise.reject(new FST_BGT_CLOSED('addTask'))
  }

  /** @internal */
  exchangeEnded (): void {
    this.#storeUnawaited(this.#exchange.outcome)
    this.#intake.runner.exchangeEnded(this.#list)
  }

  #storeUnawaited (outcome: ExchangeOutcome | undefined): void {
    const promised = this.#takePromised()
    // A failure is logged with its task.
    if (promised !== undefined) this.#store(promised, outcome)?.catch(() => {})
  }

  #store (promised: readonly Promised[], outcome: ExchangeOutcome | undefined): Promise<void> | undefined {
    const waiting = promised.filter(({ dispatch }) => dispatch !== undefined)
    return waiting[0]?.dispatch?.store(this.#list, waiting.map(({ task }) => task), outcome)
  }

  /** Takes the tasks that the reply promises. From now on a task is stored when it is added. */
  #takePromised (): Promised[] | undefined {
    const promised = this.#promised
    this.#promised = undefined
    this.#hasReplied = true
    return promised
  }
}

/** Whether a task that was abandoned would have run. Then the reply must not promise it. */
function wouldRun (when: TaskCondition, outcome: ExchangeOutcome): boolean {
  if (outcome.failed || when === 'error') return false
  return typeof when !== 'function' || readOr(true, () => {
    const answer: unknown = when(outcome)
    return isThenable(answer) || Boolean(answer)
  })
}
