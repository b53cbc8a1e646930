/** Functions that are called once, when something happens next. */
export class Watchers {
  #waiting: Array<() => void> = []

  add (notify: () => void): void {
    this.#waiting.push(notify)
  }

  notify (): void {
    if (this.#waiting.length === 0) return
    const waiting = this.#waiting
    this.#waiting = []
    for (const notify of waiting) notify()
  }
}
