/** The `setImmediate` of Node. Tests may put a clock of their own in its place, and time goes on all the same. */
const nextTurn = setImmediate

/**
 * The time of the current turn of the event loop, in milliseconds. The clock is read when the time is first asked for in a turn, and the
 * time is the same until the next turn. Reading the clock for each task costs as much as a short task itself.
 */
export class TurnClock {
  #now = 0
  #isKnown = false
  readonly #forget = (): void => { this.#isKnown = false }

  now (): number {
    if (!this.#isKnown) {
      this.#now = performance.now()
      this.#isKnown = true
      nextTurn(this.#forget)
    }
    return this.#now
  }
}
