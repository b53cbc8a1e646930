import { Timer } from '../timers.js'

/** Something that may take so long: whoever does it looks whether it is still wanted. */
export interface Deadline {
  /** Whether it was done, or given up. */
  isOver: boolean
  readonly dueAt: number
  /** Rejects the promise of whoever waits. */
  readonly reject: (error: unknown) => void
  /** Among the deadlines that wait. */
  index: number
}

/**
 * Deadlines of one length, with one timer for all. Those that are met leave at once, and the last one takes their place: a
 * list of what is long over made V8 keep the requests with it (measured: 1.3 times the CPU time of a request).
 */
export class Deadlines {
  readonly #ms: number
  readonly #late: () => Error
  readonly #waiting: Deadline[] = []
  #timer: Timer | undefined

  /** @param late what is said when the time is up */
  constructor (ms: number, late: () => Error) {
    this.#ms = ms
    this.#late = late
  }

  /** @param reject called when the time is up */
  set (reject: (error: unknown) => void): Deadline {
    const deadline: Deadline = { isOver: false, dueAt: performance.now() + this.#ms, reject, index: this.#waiting.length }
    this.#waiting.push(deadline)
    this.#timer ??= new Timer(() => { this.#look() }, this.#ms)
    return deadline
  }

  /** It was done, or has failed. */
  met (deadline: Deadline): void {
    if (deadline.isOver) return
    deadline.isOver = true
    // There is one at least, this one.
    const last = this.#waiting.pop() as Deadline
    if (last === deadline) return
    this.#waiting[deadline.index] = last
    last.index = deadline.index
  }

  /** All are up now, and nothing keeps the process alive any more. */
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
