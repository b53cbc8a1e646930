/** Tests put clocks of their own in the place of timers: time goes on all the same. */
const nextTurn = setImmediate

/**
 * The time of the turn of the event loop, in milliseconds: read when first asked for in a turn, and the same until the
 * next one. Reading the clock for each task costs as much as a short task itself.
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
