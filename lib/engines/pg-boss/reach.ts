/** Milliseconds for which a success tells that the server can be reached. */
const FRESH_MS = 1_000
/** The least milliseconds between two looks. */
const LOOK_MS = 250

/** Whether the server can be reached. Nobody looks for it unless somebody asks, or something has failed. */
export class Reach {
  readonly #look: () => Promise<unknown>
  #isReachable = true
  #isLooking = false
  #lookedAt = -Infinity
  #succeededAt = -Infinity
  #failedAt = -Infinity

  /** @param look asks the server something. What comes of it is told by `succeeded` and `failed` */
  constructor (look: () => Promise<unknown>) {
    this.#look = look
  }

  /** As it was known last. A look begins if that was a while ago. */
  get isReachable (): boolean {
    if (!this.#isReachable || performance.now() - this.#succeededAt > FRESH_MS) this.look()
    return this.#isReachable
  }

  /** A call that began at this time has succeeded. */
  succeeded (since: number): void {
    this.#succeededAt = performance.now()
    if (since > this.#failedAt) this.#isReachable = true
  }

  /** A call has failed because of the connection or the server. */
  failed (): void {
    this.#failedAt = performance.now()
    this.#isReachable = false
  }

  /** Looks whether the server can be reached. Never rejects. */
  look (): void {
    const now = performance.now()
    if (this.#isLooking || now - this.#lookedAt < LOOK_MS) return
    this.#isLooking = true
    this.#lookedAt = now
    void this.#look().catch(() => {}).then(() => { this.#isLooking = false })
  }
}
