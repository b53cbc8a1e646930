import { type ConstructorOptions, type Db, PgBoss } from 'pg-boss'
import { within } from '../../limits.js'
import { isOutage, plainPgError } from './errors.js'
import { PreparedStatements } from './prepared.js'
import { Sockets } from './sockets.js'

/** Milliseconds to reach the server, for each connection. */
export const CONNECT_MS = 2_000
/** Milliseconds for pg-boss to close by itself. */
const CLOSE_MS = 1_000
/** Milliseconds that pg waits longer for a statement than the caller, before it closes the connection. */
const GRACE_MS = 500

/** What a pool tells its owner. */
export interface PoolOwner {
  /** Something has failed outside any call. */
  failed (error: unknown): void
  /** A call that began at this time has succeeded. */
  succeeded (since: number): void
  /** A call that began at this time has failed. Returns whether that was due to connections that are replaced by now. */
  replaced (error: unknown, since: number): Promise<boolean>
  warn (message: string): void
}

/** A pg-boss with its pool of connections, or with the executor of the user. */
export class Pool {
  readonly boss: PgBoss
  /** Whether the connections are pg-boss's, and no executor of the user. */
  readonly isOwn: boolean
  readonly #sockets = new Sockets()
  readonly #owner: PoolOwner
  readonly #callMs: number
  readonly #prepared: PreparedStatements

  /** @param callMs milliseconds for each statement, if nothing else is said */
  constructor (config: ConstructorOptions, callMs: number, owner: PoolOwner) {
    this.#owner = owner
    this.#callMs = callMs
    this.isOwn = config.db === undefined
    this.boss = new PgBoss({
      connectionTimeoutMillis: CONNECT_MS,
      ...config,
      // pg-boss hands its options on to pg, which takes this one.
      stream: () => this.#sockets.open()
    } as ConstructorOptions)
    this.#prepared = new PreparedStatements(() => this.boss.getDb(), callMs + GRACE_MS)
    this.boss.on('error', error => { owner.failed(error) })
    this.boss.on('warning', ({ message }) => { owner.warn(message) })
  }

  /** Bytes received so far. */
  get received (): number {
    return this.#sockets.received
  }

  /** Runs statements that are run again and again. */
  get db (): Db {
    return this.isOwn ? this.#prepared : this.boss.getDb()
  }

  /** Runs a statement whose plan must not be kept, or that is several in one. */
  async executeOnce (text: string, values?: unknown[]): Promise<{ rows: unknown[] }> {
    return await (this.isOwn ? this.#prepared.executeOnce(text, values) : this.boss.getDb().executeSql(text, values))
  }

  /**
   * Calls pg-boss. What this rejects with carries no values.
   * @param ms milliseconds until it rejects. If not one byte has come from the server by then, all connections are cut
   */
  async ask<T> (call: (boss: PgBoss) => Promise<T>, ms = this.#callMs): Promise<T> {
    const since = performance.now()
    try {
      return await this.#askOnce(call, ms)
    } catch (error) {
      // After a failover the same name may lead to another server, which only new connections reach.
      if (!isOutage(error) || !await this.#owner.replaced(error, since)) throw plainPgError(error)
    }
    try {
      return await this.#askOnce(call, ms)
    } catch (error) {
      throw plainPgError(error)
    }
  }

  async #askOnce<T> (call: (boss: PgBoss) => Promise<T>, ms: number): Promise<T> {
    const { received } = this.#sockets
    const since = performance.now()
    const result = await within(ms, call(this.boss), () => {
      if (this.#sockets.received === received) void this.#sockets.cut()
      throw new Error(`the server did not answer within ${ms} ms`)
    })
    this.#owner.succeeded(since)
    return result
  }

  /** Ends the connections. The next statement connects anew. */
  async cut (): Promise<void> {
    await this.#sockets.cut()
  }

  /** Never rejects, and takes 2 s at most. */
  async close (): Promise<void> {
    const stopped = this.boss.stop({ graceful: false }).catch(() => {})
    await within<unknown>(CLOSE_MS, stopped, () => undefined)
    this.#sockets.close()
    await within<unknown>(CLOSE_MS, stopped, () => undefined)
  }
}
