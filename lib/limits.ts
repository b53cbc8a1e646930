import { Timer } from './timers.js'

/** The limits of a promise, in milliseconds from now, and what to do at each. A limit that is undefined is not watched. */
export interface Limits {
  readonly timeout: number | undefined
  readonly slow?: number | undefined
  /** Makes the error with which the promise rejects at its timeout. */
  readonly onTimeout: () => Error
  readonly onSlow?: () => void
  /** Called when the promise settles after its timeout. */
  readonly onLate?: () => void
}

/** Settles as a promise does, or rejects at its timeout. */
export class Limited {
  readonly promise: Promise<unknown>
  readonly #slow: Timer | undefined
  readonly #timeout: Timer | undefined

  constructor (promise: Promise<unknown>, { timeout, slow, onTimeout, onSlow, onLate }: Limits) {
    let timedOut = false
    this.#slow = slow === undefined ? undefined : new Timer(() => { onSlow?.() }, slow)
    // The promise below sets this before any timer fires.
    let reject!: (error: Error) => void
    this.#timeout = timeout === undefined
      ? undefined
      : new Timer(() => {
        timedOut = true
        this.clear()
        reject(onTimeout())
      }, timeout)
    this.promise = new Promise((resolve, _reject) => {
      reject = _reject
      const settled = (settle: (value: unknown) => void) => (value: unknown): void => {
        if (timedOut) {
          onLate?.()
          return
        }
        this.clear()
        settle(value)
      }
      try {
        promise.then(settled(resolve), settled(_reject))
      } catch (error) {
        // This only looks like a promise: its `then` throws.
        settled(_reject)(error)
      }
    })
  }

  /** Clears the timers, because nobody waits any more. */
  clear (): void {
    this.#slow?.clear()
    this.#timeout?.clear()
  }
}

/** Settles as `promise` does. When `ms` milliseconds have passed before that, it settles with what `late` returns or throws. */
export async function within<T> (ms: number, promise: Promise<T>, late: () => T): Promise<T> {
  let timer: Timer | undefined
  const time = new Promise<void>(resolve => { timer = new Timer(resolve, ms) })
  try {
    return await Promise.race([promise, time.then(late)])
  } finally {
    timer?.clear()
  }
}
