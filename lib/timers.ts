/** The most milliseconds that a timer of Node takes, a signed 32-bit number. A longer one would fire immediately. */
const MAX_MS = 2 ** 31 - 1

export class Timer {
  readonly #fn: () => void
  #handle: NodeJS.Timeout | undefined

  /** @param ms milliseconds from now, on the monotonic clock */
  constructor (fn: () => void, ms: number) {
    this.#fn = fn
    this.#wait(ms)
  }

  clear (): void {
    clearTimeout(this.#handle)
  }

  #wait (ms: number): void {
    this.#handle = setTimeout(() => {
      if (ms > MAX_MS) this.#wait(ms - MAX_MS)
      else this.#fn()
    }, Math.min(ms, MAX_MS))
  }
}
