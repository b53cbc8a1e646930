import type { FastifyBaseLogger, FastifyRequest } from 'fastify'
import type { Exchange } from '../exchange/exchange.js'
import type { BackgroundTask, TaskOwner } from './background-task.js'
import type { TaskRunMessage } from './diagnostics.js'
import { TaskQueue } from './task-queue.js'

/**
 * - `waiting`: its exchange has not ended
 * - `queued`: its next task runs at its next turn
 * - `running`: one of its tasks runs
 * - `idle`: has nothing to run now. A task that is added, or whose time has come, makes the list `queued` again
 */
export type ListPhase = 'waiting' | 'queued' | 'running' | 'idle'

/** The only task of a list that has no request. */
interface LoneTask extends BackgroundTask {
  readonly log: FastifyBaseLogger | undefined
  /** Whether an engine has delivered the task. */
  readonly isDelivered: boolean
}

/** The owner of a list, who runs it. */
export interface ListOwner {
  /** The app's logger. */
  readonly log: FastifyBaseLogger
  /** The list has something to run. */
  resume: (list: TaskList) => void
  taskCancelled: (list: TaskList, task: BackgroundTask) => void
  taskCutOff: (list: TaskList, task: BackgroundTask, reason: unknown) => void
}

/** A task list: tasks that run in the order added, one at a time, and then its cleanups. The list changes its state only here. */
export class TaskList extends TaskQueue implements TaskOwner {
  readonly request: FastifyRequest | undefined
  readonly #owner: ListOwner
  /** Undefined for a list of the app, which has no request. */
  #exchange: Exchange | undefined
  #phase: ListPhase
  /** Tasks that have not finished. */
  #unfinished = 0
  /** The task or cleanup that runs. */
  #current: BackgroundTask | undefined
  #isCleaning = false
  /** The message for the end of a traced task that is waited for. */
  #trace: TaskRunMessage | undefined
  /** The timers of what is waited for, if that has a limit. */
  #limit: { clear: () => void } | undefined
  /** Whether a failure has stopped the list (`stopOnError`). */
  #isStopped = false
  /** Whether the list has one of the seats that `concurrency` limits. */
  #hasSeat = false
  /** A number that rises when the list is abandoned. Whoever awaits one of its tasks sees that, and leaves the list alone. */
  #epoch = 0
  #index = -1
  #cleanups: BackgroundTask[] | undefined
  #onEnd: (() => void) | undefined
  /** The one task of a list that has no request. The task has the logger of the request that it comes from. */
  #onlyTask: LoneTask | undefined

  /** @param request whose tasks they are; without one the list waits for no exchange */
  constructor (owner: ListOwner, request: FastifyRequest | undefined) {
    super()
    this.#owner = owner
    this.request = request
    this.#phase = request === undefined ? 'idle' : 'waiting'
  }

  get log (): FastifyBaseLogger {
    return this.request?.log ?? this.#onlyTask?.log ?? this.#owner.log
  }

  /** Whether an engine has delivered the task of this list. */
  get isDelivery (): boolean {
    return this.#onlyTask !== undefined && this.#onlyTask.isDelivered
  }

  get exchange (): Exchange | undefined {
    return this.#exchange
  }

  get phase (): ListPhase {
    return this.#phase
  }

  /** Tasks that have not finished. */
  get unfinished (): number {
    return this.#unfinished
  }

  /** The task or cleanup that runs. */
  get current (): BackgroundTask | undefined {
    return this.#current
  }

  /** Whether a cleanup runs, or ran last. */
  get isCleaning (): boolean {
    return this.#isCleaning
  }

  get isStopped (): boolean {
    return this.#isStopped
  }

  get hasSeat (): boolean {
    return this.#hasSeat
  }

  get epoch (): number {
    return this.#epoch
  }

  /** The index among the lists that have work, or -1. */
  get index (): number {
    return this.#index
  }

  get hasWork (): boolean {
    return this.#unfinished > 0 || this.#cleanups !== undefined
  }

  attachExchange (exchange: Exchange): void {
    this.#exchange = exchange
  }

  // What the runner tells of the list

  moveTo (index: number): void {
    this.#index = index
  }

  takeSeat (): void {
    this.#hasSeat = true
  }

  leaveSeat (): void {
    this.#hasSeat = false
  }

  becomeQueued (): void {
    this.#phase = 'queued'
  }

  becomeRunning (): void {
    this.#phase = 'running'
  }

  becomeIdle (): void {
    this.#phase = 'idle'
  }

  taskAdded (): void {
    this.#unfinished++
  }

  taskEnded (): void {
    this.#unfinished--
  }

  /** Skips all tasks that are left, because one has failed. */
  stop (): void {
    this.#isStopped = true
  }

  // The task that runs

  prepare (isCleanup: boolean): void {
    this.#isCleaning = isCleanup
  }

  startTask (task: BackgroundTask): void {
    this.#current = task
  }

  /** The task that ran is done, and nobody watches it any more. */
  doneWithTask (): void {
    this.#current = undefined
    if (this.#limit !== undefined) this.#limit = undefined
  }

  watchWith (limit: { clear: () => void }): void {
    this.#limit = limit
  }

  traceWith (message: TaskRunMessage): void {
    this.#trace = message
  }

  takeTrace (): TaskRunMessage | undefined {
    const trace = this.#trace
    if (trace !== undefined) this.#trace = undefined
    return trace
  }

  // Tasks and cleanups

  /** Adds the only task of a list that has no request. */
  pushOnly (task: LoneTask): void {
    this.#onlyTask = task
    this.push(task)
  }

  /** The time by `performance.now()` until which the list does nothing, if all tasks that are left wait for their time. */
  get restsUntil (): number | undefined {
    return this.nextComesAt(this.#phase === 'idle')
  }

  addCleanup (cleanup: BackgroundTask): void {
    this.#cleanups ??= []
    this.#cleanups.push(cleanup)
  }

  /** Takes the cleanup added last. */
  nextCleanup (): BackgroundTask | undefined {
    const cleanup = this.#cleanups?.pop()
    if (this.#cleanups?.length === 0) this.#cleanups = undefined
    return cleanup
  }

  /** Takes all cleanups, the one added last first. */
  takeCleanups (): BackgroundTask[] {
    const cleanups = this.#cleanups?.reverse() ?? []
    this.#cleanups = undefined
    return cleanups
  }

  /** The tasks that have not finished, the running one first. */
  tasks (): BackgroundTask[] {
    const running = this.#current !== undefined && !this.#isCleaning ? [this.#current] : []
    return [...running, ...this.pending()]
  }

  /** Takes all tasks that have not finished. Whoever awaits the running one leaves the list alone from now on. */
  takeAll (): BackgroundTask[] {
    const tasks = this.tasks()
    this.letRunningGo()
    this.clear()
    return tasks
  }

  /** Whoever awaits the running task leaves the list alone from now on. */
  letRunningGo (): void {
    this.#epoch++
    this.#limit?.clear()
    this.doneWithTask()
  }

  taskCancelled (task: BackgroundTask): void {
    this.#owner.taskCancelled(this, task)
    this.letCancelledGo()
  }

  taskCutOff (task: BackgroundTask, reason: unknown): void {
    this.#owner.taskCutOff(this, task, reason)
  }

  /** Settles when the list has ended. Undefined if somebody waits already. */
  whenEnded (): Promise<void> | undefined {
    if (this.#onEnd !== undefined) return undefined
    return new Promise(resolve => { this.#onEnd = resolve })
  }

  protected override hasTask (): void {
    this.#owner.resume(this)
  }

  /** The list has no work left. */
  end (): void {
    this.#onEnd?.()
    this.#onEnd = undefined
  }
}
