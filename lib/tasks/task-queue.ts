import { Queue } from '../queue.js'
import { Timer } from '../timers.js'
import type { BackgroundTask } from './background-task.js'

/** A task that waits for its time. */
interface Delay {
  readonly timer: Timer
  /** The end of the wait, by `performance.now()`. */
  readonly endsAt: number
}

/** The number of empty slots up to which a new array does not pay. */
const SHORT = 16

/** One empty array for all lists, because few lists have tasks that are away. */
const NONE: never[] = []

/** The tasks of a list, in the order in which they run, and the tasks that are away, because they wait for their time or for an engine. */
export abstract class TaskQueue {
  #tasks: Array<BackgroundTask | undefined> = []
  #head = 0
  /** How many tasks of the array may have been cancelled. */
  #cancelled = 0
  /** Whether no task of the array is older than one before it. */
  #isByAge = true
  /** Tasks that wait for their time. */
  #delays: Map<BackgroundTask, Delay> | undefined
  /** Tasks that wait for an engine to store them. */
  #unstored: Queue<BackgroundTask> | undefined

  /** A task that was away has come back. */
  protected abstract hasTask (): void

  /** Adds a task, which runs after those that are there. */
  push (task: BackgroundTask): void {
    this.#tasks.push(task)
  }

  /** Adds a task that waits for an engine to store it. */
  awaitStore (task: BackgroundTask): void {
    this.#unstored ??= new Queue()
    this.#unstored.push(task)
  }

  /** Sends a task away for so many milliseconds. The other tasks do not wait for it. */
  delay (task: BackgroundTask, ms: number): void {
    this.#delays ??= new Map()
    this.#delays.set(task, { timer: new Timer(() => { this.comeBack(task) }, ms), endsAt: performance.now() + ms })
  }

  /** Brings back a task that was away. The task runs after those that are there. */
  comeBack (task: BackgroundTask): void {
    this.forget(task)
    this.#isByAge = false
    this.#tasks.push(task)
    this.hasTask()
  }

  /** Removes a task that is away. A task that is not away stays where it is. */
  forget (task: BackgroundTask): void {
    const delay = this.#delays?.get(task)
    if (delay === undefined) {
      this.#unstored?.remove(task)
      return
    }
    delay.timer.clear()
    this.#delays?.delete(task)
  }

  /** Whether tasks are away, so that the list has not ended. */
  get isWaitingForTasks (): boolean {
    return this.#isStoring || (this.#delays?.size ?? 0) > 0
  }

  /** The time by `performance.now()` when the first task comes back, if the list is idle and all tasks that are left wait for their time. */
  protected nextComesAt (isIdle: boolean): number | undefined {
    if (!isIdle || this.#isStoring || this.#delays === undefined) return undefined
    let first = Infinity
    for (const { endsAt } of this.#delays.values()) first = Math.min(first, endsAt)
    return first
  }

  /** Takes the next task. */
  next (): BackgroundTask | undefined {
    while (this.#head < this.#tasks.length) {
      const task = this.#tasks[this.#head] as BackgroundTask
      this.#tasks[this.#head++] = undefined
      // Half of the array is dropped at a time, so that a list that is never empty does not grow.
      if (this.#head > SHORT && 2 * this.#head >= this.#tasks.length) {
        this.#tasks = this.#tasks.slice(this.#head)
        this.#head = 0
      }
      if (task.state === 'pending') return task
    }
    this.#isByAge = true
    return undefined
  }

  /** Cancelled tasks are let go when half of the array may be of them. */
  protected letCancelledGo (): void {
    this.#cancelled++
    if (this.#cancelled <= SHORT || 2 * this.#cancelled < this.#tasks.length - this.#head) return
    // After the head no slot is empty.
    this.#tasks = (this.#tasks.slice(this.#head) as BackgroundTask[]).filter(({ state }) => state === 'pending')
    this.#head = 0
    this.#cancelled = 0
  }

  /** The tasks that wait for their turn, for an engine, or for their time. */
  * pending (): Iterable<BackgroundTask> {
    // After the head no slot is empty.
    for (const tasks of [this.#tasks.slice(this.#head) as BackgroundTask[], this.#unstored ?? NONE, this.#delays?.keys() ?? NONE]) {
      for (const task of tasks) if (task.state === 'pending') yield task
    }
  }

  /** When the task that has waited longest was added. */
  oldestAddedAt (): number | undefined {
    let oldest: number | undefined
    const look = (task: BackgroundTask | undefined): boolean => {
      if (task?.state !== 'pending') return false
      oldest = Math.min(oldest ?? Infinity, task.addedAt)
      return true
    }
    // A task that comes back may be older than the tasks in front of it.
    for (const task of this.#delays?.keys() ?? NONE) look(task)
    for (const task of this.#unstored ?? NONE) if (look(task)) break
    for (let i = this.#head; i < this.#tasks.length; i++) if (look(this.#tasks[i]) && this.#isByAge) break
    return oldest
  }

  protected clear (): void {
    this.#tasks = []
    this.#head = 0
    this.#unstored = undefined
    for (const { timer } of this.#delays?.values() ?? NONE) timer.clear()
    this.#delays = undefined
  }

  get #isStoring (): boolean {
    return (this.#unstored?.length ?? 0) > 0
  }
}
