/** What to do about a promise that takes its time. All times are milliseconds from now; what is undefined is not watched. */
export interface Limits {
  readonly timeout: number | undefined
  readonly slow: number | undefined
  /** Makes the error to reject with. */
  readonly onTimeout: () => Error
  readonly onSlow: () => void
  /** The promise settled after all, past its timeout. */
  readonly onLate: () => void
}

/** Settles as `promise` does, or rejects at its timeout. */
export function limited (promise: PromiseLike<unknown>, { timeout, slow, onTimeout, onSlow, onLate }: Limits): Promise<unknown> {
  return new Promise((resolve, reject) => {
    let timedOut = false
    const slowTimer = slow === undefined ? undefined : setTimeout(onSlow, slow)
    const timer = timeout === undefined
      ? undefined
      : setTimeout(() => {
        timedOut = true
        clearTimeout(slowTimer)
        reject(onTimeout())
      }, timeout)
    const settled = (settle: (value: unknown) => void) => (value: unknown): void => {
      if (timedOut) {
        onLate()
        return
      }
      clearTimeout(timer)
      clearTimeout(slowTimer)
      settle(value)
    }
    promise.then(settled(resolve), settled(reject))
  })
}

export function isThenable (value: unknown): value is PromiseLike<unknown> {
  return ((typeof value === 'object' && value !== null) || typeof value === 'function') &&
    typeof (value as { then?: unknown }).then === 'function'
}

/** Loggers and listeners of others can throw: the list goes on. */
export function attempt (fn: () => void): void {
  try {
    fn()
  } catch {}
}

/** Settles as `promise` does, or after so many milliseconds as `late` ends. */
export async function within<T> (ms: number, promise: Promise<T>, late: () => T): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  const time = new Promise<void>(resolve => { timer = setTimeout(resolve, ms) })
  try {
    return await Promise.race([promise, time.then(late)])
  } finally {
    clearTimeout(timer)
  }
}
