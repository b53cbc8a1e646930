/** How processes that wait for results learn from workers which jobs have ended. */
import type { PgBossServer } from './server.js'
import type { Settlement } from './statements.js'

/** A message on pg-boss's channel that somebody waits for results of a queue. No queue has a space in its name. */
export const WATCHED = 'watched'
/** Milliseconds between two such messages. A worker may not have heard the one before. */
const TELL_MS = 5_000
/** Milliseconds for which a worker tells of ends after such a message. */
const WATCHED_MS = 12_000
/** The most ids of a message, which has 8,000 bytes at most. */
const MAX_IDS = 150

/** The side of a worker: tells which jobs have ended, for as long as somebody waits. Nothing is sent otherwise. */
export class EndTeller {
  readonly #server: PgBossServer
  readonly #until = new Map<string, number>()

  constructor (server: PgBossServer) {
    this.#server = server
  }

  watched (queue: string): void {
    this.#until.set(queue, performance.now() + WATCHED_MS)
  }

  /** The server knows these verdicts. */
  settled (queue: string, settlements: readonly Settlement[]): void {
    const until = this.#until.get(queue)
    if (until === undefined) return
    if (until < performance.now()) {
      this.#until.delete(queue)
      return
    }
    const ids = settlements.filter(({ keep }) => keep !== undefined).map(({ id }) => id)
    const messages: string[] = []
    while (ids.length > 0) messages.push(`${queue} ${ids.splice(0, MAX_IDS).join(' ')}`)
    // Whoever waits also looks by itself.
    if (messages.length > 0) void this.#server.notify(this.#server.endsChannel, messages).catch(() => {})
  }
}

/** The side of a process that waits: one subscription, for as long as a queue is watched. */
export class EndListener {
  readonly #server: PgBossServer
  readonly #watches = new Map<string, (ids: readonly string[]) => void>()
  #subscription: Promise<{ close(): Promise<void> }> | undefined
  #timer: NodeJS.Timeout | undefined

  constructor (server: PgBossServer) {
    this.#server = server
  }

  /**
   * Calls back with the ids of jobs that end, until the function that this resolves to is called.
   * @throws if nobody can listen on a channel
   */
  async watch (queue: string, onEnd: (ids: readonly string[]) => void): Promise<() => void> {
    this.#watches.set(queue, onEnd)
    const close = (): void => {
      if (this.#watches.get(queue) === onEnd) this.#watches.delete(queue)
      if (this.#watches.size === 0) this.close()
    }
    const subscribing = this.#subscription ??= this.#subscribe()
    try {
      await subscribing
    } catch (error) {
      if (this.#subscription === subscribing) this.#subscription = undefined
      close()
      throw error
    }
    // What fails is told again.
    await this.#tell([queue]).catch(() => {})
    return close
  }

  close (): void {
    clearInterval(this.#timer)
    void this.#subscription?.then(subscription => subscription.close()).catch(() => {})
    this.#subscription = undefined
  }

  async #subscribe (): Promise<{ close(): Promise<void> }> {
    const subscription = await this.#server.listen(this.#server.endsChannel, message => {
      const [queue = '', ...ids] = message.split(' ')
      this.#watches.get(queue)?.(ids)
    }, () => {})
    if (subscription === undefined) throw new Error('this executor cannot listen on a channel')
    clearInterval(this.#timer)
    // Nobody may wait any more.
    if (this.#watches.size === 0) return subscription
    this.#timer = setInterval(() => { void this.#tell([...this.#watches.keys()]).catch(() => {}) }, TELL_MS)
    this.#timer.unref()
    return subscription
  }

  async #tell (queues: readonly string[]): Promise<void> {
    await this.#server.notify(this.#server.channel, queues.map(queue => `${WATCHED} ${queue}`))
  }
}
