import { isLocked, refusesValue } from './errors.js'
import type { PgBossServer } from './server.js'
import { settle, type Settlement } from './statements.js'

/** Most verdicts of one statement. */
const MAX_BATCH = 1_000
/** Milliseconds until the verdict of a job that another transaction holds is told again. */
const HELD_MS = 2_000

/**
 * Tells the server the verdicts of one queue. Verdicts that come while a statement is under way go together in the next one. What the server
 * cannot be told now is kept until it can.
 */
export class PgBossSettler {
  readonly #queue: string
  readonly #server: PgBossServer
  readonly #statement: string
  readonly #skippingLocked: string
  readonly #onSettled: (settlements: readonly Settlement[]) => void
  #waiting: Settlement[] = []
  /** Verdicts of the statement that is under way. */
  #beingWritten = 0
  #isRunning = false
  /** Verdicts of jobs that another transaction holds. */
  #held: Settlement[] = []
  #heldTimer: NodeJS.Timeout | undefined

  constructor (queue: string, server: PgBossServer, onSettled: (settlements: readonly Settlement[]) => void) {
    this.#queue = queue
    this.#server = server
    this.#statement = settle(server.schema, false)
    this.#skippingLocked = settle(server.schema, true)
    this.#onSettled = onSettled
  }

  /** Verdicts that the server does not know yet. */
  get size (): number {
    return this.#waiting.length + this.#beingWritten + this.#held.length
  }

  get isIdle (): boolean {
    return !this.#isRunning && this.#held.length === 0
  }

  add (settlement: Settlement): void {
    this.#waiting.push(settlement)
    this.#start()
  }

  close (): void {
    clearTimeout(this.#heldTimer)
  }

  #start (): void {
    if (this.#isRunning) return
    this.#isRunning = true
    // The verdicts of one turn of the event loop go together.
    setImmediate(() => { void this.#runAll() })
  }

  async #runAll (): Promise<void> {
    while (this.#waiting.length > 0 && !this.#server.closing.aborted) {
      const batch = this.#waiting.splice(0, MAX_BATCH)
      this.#beingWritten = batch.length
      try {
        await this.#write(batch)
        this.#beingWritten = 0
        this.#onSettled(batch)
      } catch (error) {
        this.#beingWritten = 0
        this.#waiting = batch.concat(this.#waiting)
        this.#server.report(error)
        await this.#server.pause()
      }
    }
    this.#isRunning = false
    this.#onSettled([])
  }

  async #write (batch: readonly Settlement[]): Promise<void> {
    try {
      await this.#server.query(this.#statement, [this.#queue, JSON.stringify(batch)])
    } catch (error) {
      if (refusesValue(error)) await this.#writeSingly(batch, error)
      else if (isLocked(error)) await this.#writeUnlocked(batch)
      else throw error
      return
    }
    if (batch.some(({ uncounted }) => uncounted)) await this.#notify()
  }

  /** One result that the server cannot store, for example one of more than 256 MB, does not hold up the others. */
  async #writeSingly (batch: readonly Settlement[], error: unknown): Promise<void> {
    const [first, ...others] = batch
    if (others.length > 0) {
      for (const settlement of batch) await this.#write([settlement])
    } else if (first !== undefined) {
      this.#server.report(error)
      const { output, ...rest } = first
      if (output !== undefined) await this.#write([rest])
    }
  }

  /** A job that another transaction holds does not hold up the others. Its verdict is told when the transaction has ended. */
  async #writeUnlocked (batch: readonly Settlement[]): Promise<void> {
    if (batch.length === 1) return this.#hold(batch)
    const settled = new Set<unknown>()
    for (const row of await this.#server.query(this.#skippingLocked, [this.#queue, JSON.stringify(batch)])) settled.add((row as { id: unknown }).id)
    const left = batch.filter(({ id }) => !settled.has(id))
    // A job that another process has started since is among them, too. Its verdict is told in vain, without a wait.
    for (const settlement of left) await this.#write([settlement])
  }

  #hold (held: readonly Settlement[]): void {
    this.#held.push(...held)
    this.#heldTimer ??= setTimeout(() => {
      this.#heldTimer = undefined
      this.#waiting.push(...this.#held.splice(0))
      this.#start()
    }, HELD_MS)
  }

  /** Tells other processes of a job that was returned. Without this they find it half a second later, when they poll. */
  async #notify (): Promise<void> {
    await this.#server.notify(this.#server.channel, [this.#queue]).catch(() => {})
  }
}
