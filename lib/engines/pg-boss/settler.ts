import { refusesValue } from './errors.js'
import type { PgBossServer } from './server.js'
import { NOTIFY, settle, type Settlement } from './statements.js'

/** Most verdicts of one statement. */
const MAX_BATCH = 1_000

/**
 * Tells the server the verdicts of one queue. Verdicts that come while a statement is under way go together in the next one. What the server
 * cannot be told now is kept until it can.
 */
export class PgBossSettler {
  readonly #queue: string
  readonly #server: PgBossServer
  readonly #statement: string
  readonly #onSettled: (settlements: readonly Settlement[]) => void
  #waiting: Settlement[] = []
  /** Verdicts of the statement that is under way. */
  #beingWritten = 0
  #isRunning = false
  /** The end of the last statement. Two concurrent statements on the same jobs could lock each other out. */
  #lastStatement: Promise<void> = Promise.resolve()

  constructor (queue: string, server: PgBossServer, onSettled: (settlements: readonly Settlement[]) => void) {
    this.#queue = queue
    this.#server = server
    this.#statement = settle(server.schema)
    this.#onSettled = onSettled
  }

  /** Verdicts that the server does not know yet. */
  get size (): number {
    return this.#waiting.length + this.#beingWritten
  }

  get isIdle (): boolean {
    return !this.#isRunning
  }

  add (settlement: Settlement): void {
    this.#waiting.push(settlement)
    if (this.#isRunning) return
    this.#isRunning = true
    // The verdicts of one turn of the event loop go together.
    setImmediate(() => { void this.#runAll() })
  }

  /** Shows signs of life of jobs. */
  async touch (jobs: Array<{ readonly id: string, readonly retryCount: number }>): Promise<void> {
    await this.#inTurn(async () => { await this.#server.ask(boss => boss.touch(this.#queue, jobs)) })
  }

  async #runAll (): Promise<void> {
    while (this.#waiting.length > 0 && !this.#server.closing.aborted) {
      const batch = this.#waiting.splice(0, MAX_BATCH)
      this.#beingWritten = batch.length
      try {
        await this.#inTurn(() => this.#write(batch))
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
      if (!refusesValue(error)) throw error
      await this.#writeSingly(batch, error)
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

  /** Tells other processes of a job that was returned. Without this they find it half a second later, when they poll. */
  async #notify (): Promise<void> {
    await this.#server.query(NOTIFY, [this.#server.channel, this.#queue]).catch(() => {})
  }

  #inTurn (call: () => Promise<void>): Promise<void> {
    const result = this.#lastStatement.then(call)
    this.#lastStatement = result.catch(() => {})
    return result
  }
}
