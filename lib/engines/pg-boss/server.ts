import { createHash } from 'node:crypto'
import { Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { type ConstructorOptions, type Db, type JobInsert, PgBoss } from 'pg-boss'
import type { EngineEvents, TaskSpec } from '../engine.js'
import type { FetchedJob } from './jobs.js'
import { PreparedStatements } from './prepared.js'
import { IN_INDEX_ORDER, keepTimes, neverExpire } from './statements.js'

/** Milliseconds to reach the server at the start, and for every later connection. */
const CONNECT_MS = 2_000
/** Milliseconds for all of the start: the first one creates the schema. */
const OPEN_MS = 30_000
/** Milliseconds for a statement of a worker. */
const CALL_MS = 10_000
/** Milliseconds for one that a request waits for. */
export const REQUEST_MS = 4_000
/** Milliseconds until something that failed is tried again. */
const RETRY_MS = 500
/** Milliseconds for pg-boss to close by itself. */
const CLOSE_MS = 1_000

/** Seconds without a sign of life after which a job's process is taken for dead: the least that pg-boss accepts. */
const HEARTBEAT_SECONDS = 10
/** Retries are the core's to decide: pg-boss is never to fail a job by itself. */
const RETRY_LIMIT = 1_000_000_000
/** Ten years: a job that waits is not to vanish. */
const RETENTION_SECONDS = 315_360_000

/** pg-boss, its connections, and their end. */
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
      // An option of pg: pg-boss hands its options on to it.
      stream: () => this.#sockets.open()
    } as ConstructorOptions)
    this.#tasks = tasks
    this.boss.on('error', error => { this.report(error) })
    this.boss.on('warning', ({ message }) => {
      if (!this.closing.aborted) events.log.warn(`background task engine "pg-boss": ${message}`)
    })
  }

  /** Aborts when it closes. */
  get closing (): AbortSignal {
    return this.#closing.signal
  }

  /** pg-boss's own channel (`notifyChannelSql`, 12.38): a job of a queue with `notify` is told there by the queue's name. */
  get channel (): string {
    const name = /^"[a-z_][a-z0-9_]*"$/.test(this.schema) ? this.schema.slice(1, -1) : this.schema
    return `pgboss_${createHash('sha224').update(name).digest('hex').slice(0, 24)}`
  }

  /** Connects and declares the queues. When it rejects, all is closed. */
  async open (): Promise<void> {
    const names = this.#tasks.map(({ name }) => name)
    // A server that takes the connection and says nothing.
    let isSilent = false
    const silence = setTimeout(() => {
      isSilent = this.#isOwnPool && this.#sockets.heard === 0
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
   * Calls, for so long. What it rejects with carries no values.
   * @param ms after which it rejects; and if not a byte has come from the server meanwhile, all connections are cut
   */
  async ask<T> (call: (boss: PgBoss) => Promise<T>, ms = CALL_MS): Promise<T> {
    const { heard } = this.#sockets
    try {
      return await within(ms, call(this.boss), () => {
        if (this.#sockets.heard === heard) this.#sockets.cut()
        return new Error(`the server did not answer within ${ms} ms`)
      })
    } catch (error) {
      throw plain(error)
    }
  }

  /**
   * Stores jobs, and leaves out those whose id exists.
   * @param tx the caller's transaction
   * @returns the ids of the others
   */
  async insert (queue: string, jobs: JobInsert[], tx?: Db): Promise<readonly string[]> {
    const db = tx ?? (this.#isOwnPool ? this.#prepared : undefined)
    return await this.ask(boss => boss.insert(queue, jobs, { returnId: true, ...db !== undefined && { db } }), REQUEST_MS) ?? []
  }

  /** Runs a statement that is run again and again. */
  async query (text: string, values: unknown[]): Promise<unknown[]> {
    const { rows } = await this.ask(boss => (this.#isOwnPool ? this.#prepared : boss.getDb()).executeSql(text, values))
    return rows
  }

  async fetch (queue: string, batchSize: number): Promise<FetchedJob[]> {
    return await this.ask(boss => boss.fetch<unknown>(queue, this.#isOwnPool ? { batchSize, db: inIndexOrder(boss.getDb()) } : { batchSize }))
  }

  /** Something failed that nobody asked for. */
  report (error: unknown): void {
    if (!this.closing.aborted) this.#events.error(plain(error))
  }

  /** After a failure; ends when it closes. */
  async pause (): Promise<void> {
    await sleep(RETRY_MS, undefined, { signal: this.closing }).catch(() => {})
  }

  /** Never rejects, and takes 2 s at most. */
  async close (): Promise<void> {
    this.#closing.abort()
    const stopped = this.boss.stop({ graceful: false }).catch(() => {})
    await within(CLOSE_MS, stopped, () => undefined)
    this.#sockets.close()
    await within(CLOSE_MS, stopped, () => undefined)
  }

  /** `createQueue` leaves a queue that exists as it is. */
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

/** Two statements without values are one message, and one transaction. pg answers with a result for each. */
function inIndexOrder (db: Db): Db {
  return {
    async executeSql (text) {
      const results = await db.executeSql(`${IN_INDEX_ORDER};${text}`) as unknown as Array<{ rows: unknown[] }>
      return { rows: results.at(-1)?.rows ?? [] }
    }
  }
}

/** How often ended jobs are looked through for those whose time is over: they go at most a quarter late. */
function sweepSeconds (tasks: readonly TaskSpec[]): number {
  const shortest = Math.min(...tasks.flatMap(({ keep }) => [keep.succeeded, keep.failed]))
  return Math.min(Math.max(Math.floor(shortest / 4), 1), 900)
}

/**
 * The sockets of the pool. pg-boss's stop waits for statements that a silent server will never answer: what is left is
 * destroyed, and nothing keeps the process alive.
 */
class Sockets {
  readonly #open = new Set<Socket>()
  #isClosed = false
  #heardBefore = 0

  /** Bytes received so far. */
  get heard (): number {
    let bytes = this.#heardBefore
    for (const socket of this.#open) bytes += socket.bytesRead
    return bytes
  }

  open (): Socket {
    const socket = new Socket()
    this.#open.add(socket)
    socket.once('close', () => {
      this.#open.delete(socket)
      this.#heardBefore += socket.bytesRead
    })
    // Once pg listens to it.
    if (this.#isClosed) process.nextTick(() => { socket.destroy() })
    return socket
  }

  /** The next statement connects anew. Without an error: pg tells those who wait, and one that it is ending listens to none. */
  cut (): void {
    for (const socket of this.#open) socket.destroy()
  }

  close (): void {
    this.#isClosed = true
    this.cut()
  }
}

/** Errors of pg carry statement, detail and values: of a refused value not even the message is safe. */
function plain (error: unknown): Error {
  const { message, code, errors } = (typeof error === 'object' && error !== null ? error : {}) as { message?: unknown, code?: unknown, errors?: unknown }
  // Node gives several attempts to connect one error without a message.
  const [first] = Array.isArray(errors) ? errors as Array<{ message?: unknown } | undefined> : []
  const text = refusesValue(error) ? `the server refused a value (SQLSTATE ${String(code)})` : message || first?.message || code || error
  return Object.assign(new Error(String(text)), typeof code === 'string' && { code })
}

/** Whether the server took exception to what it was sent, so that sending it again is in vain. */
export function refusesValue (error: unknown): boolean {
  const code: unknown = typeof error === 'object' && error !== null && 'code' in error ? error.code : undefined
  return typeof code === 'string' && /^(?:22|23|54)[0-9A-Z]{3}$/.test(code)
}

/** @param late what it rejects with after `ms`; undefined: it resolves */
async function within<T> (ms: number, promise: Promise<T>, late: () => Error | undefined): Promise<T> {
  let timer: NodeJS.Timeout | undefined
  const time = new Promise<never>((resolve, reject) => {
    timer = setTimeout(() => {
      const error = late()
      if (error === undefined) resolve(undefined as never)
      else reject(error)
    }, ms)
  })
  try {
    return await Promise.race([promise, time])
  } finally {
    clearTimeout(timer)
  }
}
