import { Timer } from '../timers.js'

/** The deadline of one operation. Whoever carries out the operation checks whether it is still wanted. */
export interface Deadline {
  /** Whether the operation has ended, or its time has passed. */
  isOver: boolean
  readonly dueAt: number
  /** Rejects the promise of whoever waits. */
  readonly reject: (error: unknown) => void
  /** The index among the deadlines that wait. */
  index: number
}

/**
 * Deadlines of one length, with one timer for all. A deadline that is met leaves the array immediately, and the last one takes its index.
 * An array of deadlines that were long over made V8 keep the requests with them (measured: 1.3 times the CPU time of a request).
 */
export class Deadlines {
  readonly #ms: number
  readonly #late: () => Error
  readonly #waiting: Deadline[] = []
  #timer: Timer | undefined

  /** @param late makes the error for when the time is up */
  constructor (ms: number, late: () => Error) {
    this.#ms = ms
    this.#late = late
  }

  /**
   * Sets a deadline.
   * @param reject called when the time is up
   */
  set (reject: (error: unknown) => void): Deadline {
    const deadline: Deadline = { isOver: false, dueAt: performance.now() + this.#ms, reject, index: this.#waiting.length }
    this.#waiting.push(deadline)
    this.#timer ??= new Timer(() => { this.#look() }, this.#ms)
    return deadline
  }

  /** The operation has ended in time: it was done, or it has failed. */
  met (deadline: Deadline): void {
    if (deadline.isOver) return
    deadline.isOver = true
    // The array has at least this deadline.
    const last = this.#waiting.pop() as Deadline
    if (last === deadline) return
    this.#waiting[deadline.index] = last
    last.index = deadline.index
  }

  /** Ends all deadlines now, so that no timer keeps the process alive. */
  expireAll (): void {
    this.#timer?.clear()
    this.#timer = undefined
    this.#expire(this.#waiting.slice())
  }

  #look (): void {
    const now = performance.now()
    // Timers can fire a little early.
    this.#expire(this.#waiting.filter(({ dueAt }) => dueAt <= now + 1))
    let next = Infinity
    for (const { dueAt } of this.#waiting) next = Math.min(next, dueAt)
    this.#timer = next === Infinity ? undefined : new Timer(() => { this.#look() }, next - now)
  }

  #expire (deadlines: readonly Deadline[]): void {
    for (const deadline of deadlines) {
      this.met(deadline)
      deadline.reject(this.#late())
    }
  }
}
