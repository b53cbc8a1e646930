import { Queue } from '../queue.js'
import { Timer } from '../timers.js'
import type { BackgroundTask } from './background-task.js'

/** A task that waits for its time. */
interface Delay {
  readonly timer: Timer
  /** On the clock of `performance.now()`. */
  readonly endsAt: number
}

/** So many slots of tasks that were taken are not worth a new array. */
const SHORT = 16

/** No list has an array of its own for what few have. */
const NONE: never[] = []

/** The tasks of a list, in the order in which they run, and those that are away: they wait for their time, or for an engine. */
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

  /** The task runs after those that are there. */
  push (task: BackgroundTask): void {
    this.#tasks.push(task)
  }

  /** The task waits for an engine to store it. */
  awaitStore (task: BackgroundTask): void {
    this.#unstored ??= new Queue()
    this.#unstored.push(task)
  }

  /** The task starts after so many milliseconds; the others do not wait for it. */
  delay (task: BackgroundTask, ms: number): void {
    this.#delays ??= new Map()
    this.#delays.set(task, { timer: new Timer(() => { this.comeBack(task) }, ms), endsAt: performance.now() + ms })
  }

  /** A task that was away runs now, after those that are there. */
  comeBack (task: BackgroundTask): void {
    this.forget(task)
    this.#isByAge = false
    this.#tasks.push(task)
    this.hasTask()
  }

  /** A task that was away, if it was, is done. */
  forget (task: BackgroundTask): void {
    const delay = this.#delays?.get(task)
    if (delay === undefined) {
      this.#unstored?.remove(task)
      return
    }
    delay.timer.clear()
    this.#delays?.delete(task)
  }

  /** Whether tasks are away: the list has not ended. */
  get isWaitingForTasks (): boolean {
    return this.#isStoring || (this.#delays?.size ?? 0) > 0
  }

  /** `performance.now()` when the first task comes back, if all that is left are tasks that wait for their time. */
  protected get nextComesAt (): number | undefined {
    if (this.#isStoring || this.#delays === undefined) return undefined
    let first = Infinity
    for (const { endsAt } of this.#delays.values()) first = Math.min(first, endsAt)
    return first
  }

  /** Takes the next task. */
  next (): BackgroundTask | undefined {
    while (this.#head < this.#tasks.length) {
      const task = this.#tasks[this.#head] as BackgroundTask
      this.#tasks[this.#head++] = undefined
      // Half of the array at a time, so that a list that is never empty does not grow.
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
    this.#tasks = this.#tasks.slice(this.#head).filter(task => task?.state === 'pending')
    this.#head = 0
    this.#cancelled = 0
  }

  /** The tasks that wait: for their turn, for an engine, for their time. */
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
    // Of those that come back some are older than what stands in front of them.
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
