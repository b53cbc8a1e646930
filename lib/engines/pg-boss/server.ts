import { createHash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { type ConstructorOptions, type Db, type JobInsert, PgBoss } from 'pg-boss'
import { within } from '../../limits.js'
import type { EngineEvents, TaskSpec } from '../engine.js'
import { plainPgError } from './errors.js'
import type { FetchedJob } from './jobs.js'
import { PreparedStatements } from './prepared.js'
import { Sockets } from './sockets.js'
import { IN_INDEX_ORDER, keepTimes, neverExpire } from './statements.js'

/** Milliseconds to reach the server at the start, and for every later connection. */
const CONNECT_MS = 2_000
/** Milliseconds for the whole start. The first start creates the schema. */
const OPEN_MS = 30_000
/** Milliseconds for a statement of a worker. */
const CALL_MS = 10_000
/** Milliseconds for a statement that a request waits for. */
export const REQUEST_MS = 4_000
/** Milliseconds until something that failed is tried again. */
const RETRY_MS = 500
/** Milliseconds for pg-boss to close by itself. */
const CLOSE_MS = 1_000

/** Seconds without a sign of life after which a job's process counts as dead. pg-boss accepts no less. */
const HEARTBEAT_SECONDS = 10
/** The core decides about retries, and pg-boss never fails a job by itself. */
const RETRY_LIMIT = 1_000_000_000
/** Seconds: ten years, so that a job that waits does not vanish. */
const RETENTION_SECONDS = 315_360_000

/** pg-boss and its connections, from their start to their end. */
export class PgBossServer {
  readonly boss: PgBoss
  readonly schema: string
  readonly #sockets = new Sockets()
  readonly #events: EngineEvents
  readonly #tasks: readonly TaskSpec[]
  readonly #isOwnPool: boolean
  readonly #prepared = new PreparedStatements(() => this.boss.getDb())
  readonly #closing = new AbortController()

  constructor (config: ConstructorOptions, tasks: readonly TaskSpec[], events: EngineEvents) {
    this.schema = config.schema ?? 'pgboss'
    this.#events = events
    this.#isOwnPool = config.db === undefined
    const sweep = sweepSeconds(tasks)
    this.boss = new PgBoss({
      connectionTimeoutMillis: CONNECT_MS,
      maintenanceIntervalSeconds: sweep,
      superviseIntervalSeconds: Math.min(sweep, 60),
      ...config,
      // pg-boss hands its options on to pg, which takes this one.
      stream: () => this.#sockets.open()
    } as ConstructorOptions)
    this.#tasks = tasks
    this.boss.on('error', error => { this.report(error) })
    this.boss.on('warning', ({ message }) => {
      if (!this.closing.aborted) events.log.warn(`background task engine "pg-boss": ${message}`)
    })
  }

  /** Aborts when the server is closed. */
  get closing (): AbortSignal {
    return this.#closing.signal
  }

  /** The channel of pg-boss itself (`notifyChannelSql`, 12.38), where it sends the name of a queue that has a new job. */
  get channel (): string {
    const name = /^"[a-z_][a-z0-9_]*"$/.test(this.schema) ? this.schema.slice(1, -1) : this.schema
    return `pgboss_${createHash('sha224').update(name).digest('hex').slice(0, 24)}`
  }

  /** Connects and declares the queues. When this rejects, everything is closed. */
  async open (): Promise<void> {
    const names = this.#tasks.map(({ name }) => name)
    // A server may accept the connection and say nothing.
    let isSilent = false
    const silence = setTimeout(() => {
      isSilent = this.#isOwnPool && this.#sockets.received === 0
      if (isSilent) this.#sockets.close()
    }, CONNECT_MS)
    try {
      await this.ask(async boss => {
        await boss.start()
        for (const task of this.#tasks) await this.#declare(task)
        await boss.getDb().executeSql(neverExpire(this.schema), [names])
      }, OPEN_MS)
    } catch (error) {
      await this.close()
      throw isSilent ? new Error(`the server did not answer within ${CONNECT_MS} ms`) : error
    } finally {
      clearTimeout(silence)
    }
  }

  /**
   * Calls pg-boss. What this rejects with carries no values.
   * @param ms milliseconds until it rejects. If not one byte has come from the server by then, all connections are cut
   */
  async ask<T> (call: (boss: PgBoss) => Promise<T>, ms = CALL_MS): Promise<T> {
    const { received } = this.#sockets
    try {
      return await within(ms, call(this.boss), () => {
        if (this.#sockets.received === received) this.#sockets.cut()
        throw new Error(`the server did not answer within ${ms} ms`)
      })
    } catch (error) {
      throw plainPgError(error)
    }
  }

  /**
   * Stores jobs, except those whose id is stored already.
   * @param tx the caller's transaction
   * @returns the ids of the jobs that are new
   */
  async insert (queue: string, jobs: JobInsert[], tx?: Db): Promise<readonly string[]> {
    const db = tx ?? (this.#isOwnPool ? this.#prepared : undefined)
    return await this.ask(boss => boss.insert(queue, jobs, { returnId: true, ...db !== undefined && { db } }), REQUEST_MS) ?? []
  }

  /** Runs a statement whose plan is worth keeping, because it is run again and again. */
  async query (text: string, values: unknown[]): Promise<unknown[]> {
    const { rows } = await this.ask(boss => (this.#isOwnPool ? this.#prepared : boss.getDb()).executeSql(text, values))
    return rows
  }

  async fetch (queue: string, batchSize: number): Promise<FetchedJob[]> {
    return await this.ask(boss => boss.fetch<unknown>(queue, this.#isOwnPool ? { batchSize, db: inIndexOrder(boss.getDb()) } : { batchSize }))
  }

  /** Reports what failed outside any call of the core. */
  report (error: unknown): void {
    if (!this.closing.aborted) this.#events.error(plainPgError(error))
  }

  /** Waits after a failure, until the next attempt or until the server is closed. */
  async pause (): Promise<void> {
    await sleep(RETRY_MS, undefined, { signal: this.closing }).catch(() => {})
  }

  /** Never rejects, and takes 2 s at most. */
  async close (): Promise<void> {
    this.#closing.abort()
    const stopped = this.boss.stop({ graceful: false }).catch(() => {})
    await within<unknown>(CLOSE_MS, stopped, () => undefined)
    this.#sockets.close()
    await within<unknown>(CLOSE_MS, stopped, () => undefined)
  }

  /** `createQueue` leaves a queue that exists as it is, so its settings are updated too. */
  async #declare ({ name, keep }: TaskSpec): Promise<void> {
    const queue = {
      notify: true,
      retryLimit: RETRY_LIMIT,
      retryDelay: 0,
      retryBackoff: false,
      heartbeatSeconds: HEARTBEAT_SECONDS,
      retentionSeconds: RETENTION_SECONDS,
      deleteAfterSeconds: keepTimes(keep).succeeded
    }
    await this.boss.createQueue(name, queue)
    await this.boss.updateQueue(name, queue)
  }
}

/** Two statements without values travel as one message, and form one transaction. pg answers with a result for each. */
function inIndexOrder (db: Db): Db {
  return {
    async executeSql (text) {
      const results = await db.executeSql(`${IN_INDEX_ORDER};${text}`) as unknown as Array<{ rows: unknown[] }>
      return { rows: results.at(-1)?.rows ?? [] }
    }
  }
}

/** Seconds between two searches for records whose time is over. They go at most a quarter of that time late. */
function sweepSeconds (tasks: readonly TaskSpec[]): number {
  const shortest = Math.min(...tasks.flatMap(({ keep }) => [keep.succeeded, keep.failed]))
  return Math.min(Math.max(Math.floor(shortest / 4), 1), 900)
}
