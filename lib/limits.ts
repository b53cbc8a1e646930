import { Timer } from './timers.js'

/** What to do about a promise that takes its time. All times are milliseconds from now; what is undefined is not watched. */
export interface Limits {
  readonly timeout: number | undefined
  readonly slow?: number | undefined
  /** Makes the error to reject with. */
  readonly onTimeout: () => Error
  readonly onSlow?: () => void
  /** The promise settled after all, past its timeout. */
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
    // Set before any timer fires.
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
        // What only looks like a promise.
        settled(_reject)(error)
      }
    })
  }

  /** Nobody waits any more. */
  clear (): void {
    this.#slow?.clear()
    this.#timeout?.clear()
  }
}

/** Settles as `promise` does, or after so many milliseconds as `late` ends. */
export async function within<T> (ms: number, promise: Promise<T>, late: () => T): Promise<T> {
  let timer: Timer | undefined
  const time = new Promise<void>(resolve => { timer = new Timer(resolve, ms) })
  try {
    return await Promise.race([promise, time.then(late)])
  } finally {
    timer?.clear()
  }
}
