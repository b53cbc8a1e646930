import { createHash } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import type { ConstructorOptions, Db, JobInsert, JobWithMetadata } from 'pg-boss'
import { attempt } from '../../foreign.js'
import { within } from '../../limits.js'
import type { EngineEvents, TaskSpec } from '../engine.js'
import { checkCoupling } from './coupling.js'
import { isOutage, isQueueGone, isReadOnly, plainPgError } from './errors.js'
import type { FetchedJob } from './jobs.js'
import { CONNECT_MS, Pool, type PoolOwner } from './pool.js'
import { declareQueues } from './queues.js'
import { Reach } from './reach.js'
import { IN_INDEX_ORDER, NOTIFY } from './statements.js'
import { fetchAnew, insertChange } from './texts.js'

/** Milliseconds of silence after which a start is given up. The first start creates the schema, and a later one may change it. */
const SILENCE_MS = 30_000
/** Milliseconds for a statement of a worker. */
const CALL_MS = 10_000
/** Milliseconds for a statement that a request waits for. */
const REQUEST_MS = 4_000
/** Milliseconds until something that failed is tried again. */
const RETRY_MS = 500
/** Connections that only the worker uses, besides the one that listens. */
const WORKER_CONNECTIONS = 5

/**
 * pg-boss and its connections, from their start to their end. The worker has a pool of its own, so that its signs of life never wait for a
 * connection that stores jobs.
 */
export class PgBossServer {
  readonly schema: string
  readonly #config: ConstructorOptions
  readonly #events: EngineEvents
  readonly #tasks: readonly TaskSpec[]
  readonly #owner: PoolOwner
  readonly web: Pool
  /** The same as `web` until a worker is started, and always where the user's executor is used. */
  #worker: Pool
  readonly #closing = new AbortController()
  /** Whether the server can be reached. */
  readonly reach: Reach
  #isOut = false
  #failedAt = -Infinity
  /** When all connections were last replaced. */
  #replacedAt = -Infinity
  #replacing: Promise<unknown> | undefined

  constructor (config: ConstructorOptions, tasks: readonly TaskSpec[], events: EngineEvents) {
    this.schema = config.schema ?? 'pgboss'
    this.#events = events
    this.#tasks = tasks
    this.#owner = {
      failed: error => { this.report(error) },
      succeeded: since => {
        this.reach.succeeded(since)
        if (since > this.#failedAt) this.#isOut = false
      },
      replaced: async (error, since) => {
        this.reach.failed()
        return await this.#areReplaced(error, since)
      },
      warn: message => {
        if (!this.closing.aborted) attempt(() => { events.log.warn(`background task engine "pg-boss": ${message}`) })
      }
    }
    const sweep = sweepSeconds(tasks)
    this.#config = { maintenanceIntervalSeconds: sweep, superviseIntervalSeconds: Math.min(sweep, 60), ...config }
    this.web = this.#worker = new Pool(this.#config, REQUEST_MS, this.#owner)
    this.reach = new Reach(async () => {
      await this.web.ask(async boss => {
        const { rows: [row] } = await boss.getDb().executeSql('SELECT current_setting(\'transaction_read_only\') AS "readOnly"')
        if ((row as { readOnly: unknown }).readOnly === 'on') throw Object.assign(new Error('read-only'), { code: '25006' })
      }, CONNECT_MS)
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
    let declared = 0
    try {
      await this.#unlessSilent(() => declared, this.web.ask(async boss => {
        await boss.start()
        await this.#declare(() => { declared++ })
        const warning = await checkCoupling(this.web, this.schema, this.#tasks[0]?.name)
        if (warning !== undefined) this.#owner.warn(warning)
      }, Infinity))
    } catch (error) {
      await this.close()
      throw error
    }
  }

  /** Opens the connections that only the worker uses. */
  async openForWorker (): Promise<void> {
    if (this.#worker !== this.web || !this.web.isOwn) return
    const own = { supervise: false, migrate: false, schedule: false, registerInstance: false, max: WORKER_CONNECTIONS }
    const pool = new Pool({ ...this.#config, ...own }, CALL_MS, this.#owner)
    try {
      await pool.ask(boss => boss.start())
      if (this.closing.aborted) throw new Error('the engine is closed')
    } catch (error) {
      await pool.close()
      throw error
    }
    this.#worker = pool
  }

  /**
   * Stores jobs, except those whose id is stored already.
   * @param lockMs milliseconds to wait for a lock of another transaction
   * @param tx the caller's transaction
   * @param freesKeys whether jobs take the place of cancelled ones of the same id
   * @returns the ids of the jobs that are new
   */
  async insert (queue: string, jobs: JobInsert[], lockMs: number, tx?: Db, freesKeys = false): Promise<readonly string[]> {
    const ids = freesKeys ? [`{${jobs.map(({ id }) => id).join(',')}}`] : []
    const changed = (db: Db, ms: number | undefined): Db => {
      const change = insertChange(ms, freesKeys)
      return { executeSql: (text, values = []) => db.executeSql(change(text), [...values, ...ids]) }
    }
    if (tx !== undefined) return await this.#insertWith(freesKeys ? changed(tx, undefined) : tx, queue, jobs)
    const limited = changed(this.web.db, lockMs)
    const insert = async (): Promise<string[]> => await this.web.ask(boss => boss.insert(queue, jobs, { returnId: true, db: limited }), REQUEST_MS) ?? []
    try {
      return await insert()
    } catch (error) {
      if (!isQueueGone(error)) throw error
      await this.#declare()
      return await insert()
    }
  }

  /** Reads a job. */
  async find (queue: string, id: string): Promise<JobWithMetadata<unknown> | undefined> {
    const [job] = await this.web.ask(boss => boss.findJobs<unknown>(queue, { id, limit: 1 }))
    return job
  }

  /** Runs a statement for an operator. Its plan depends on its values, so it is not kept. */
  async ask (text: string, values: unknown[]): Promise<unknown[]> {
    const { rows } = await this.web.ask(() => this.web.executeOnce(text, values))
    return rows
  }

  /** Tells something to the processes that listen on a channel. */
  async notify (channel: string, messages: readonly string[]): Promise<void> {
    await this.#worker.ask(() => this.#worker.db.executeSql(NOTIFY, [channel, messages]), CALL_MS)
  }

  /** Tells the core that a job that runs here was cancelled. */
  cancelled (queue: string, id: string): void {
    attempt(() => { this.#events.cancelled(queue, id) })
  }

  /** Runs a statement of the worker whose plan is worth keeping, because it is run again and again. */
  async query (text: string, values: unknown[]): Promise<unknown[]> {
    const { rows } = await this.#worker.ask(() => this.#worker.db.executeSql(text, values), CALL_MS)
    return rows
  }

  async fetch (queue: string, batchSize: number): Promise<FetchedJob[]> {
    const pool = this.#worker
    return await pool.ask(boss => boss.fetch<unknown>(queue, { batchSize, db: fetching(pool) }), CALL_MS)
  }

  /** The channel where workers tell which jobs have ended, while somebody waits for one. */
  get endsChannel (): string {
    return `${this.channel}_ends`
  }

  /** Listens on a channel, over a connection of its own, which pg-boss restores by itself. What it resolves to never rejects. */
  async listen (channel: string, onMessage: (message: string) => void, onReconnect: () => void): Promise<{ close(): Promise<void> } | undefined> {
    let isLate = false
    try {
      return await this.#worker.ask(async boss => {
        const found = await boss.getDb().listen?.(channel, onMessage, onReconnect)
        if (found === undefined) return undefined
        const subscription = {
          async close () {
            // The user's executor may have returned anything.
            await Promise.resolve(found).then(async found => { await found.close() }).catch(() => {})
          }
        }
        if (isLate) void subscription.close()
        return subscription
      }, CALL_MS)
    } catch (error) {
      isLate = true
      throw error
    }
  }

  /** Reports what failed outside any call of the core. An outage is told once. What fails until something has succeeded is the same outage. */
  report (error: unknown): void {
    if (this.closing.aborted) return
    if (isOutage(error)) {
      this.reach.look()
      this.#failedAt = performance.now()
      if (this.#isOut) return
      this.#isOut = true
    }
    this.#events.error(plainPgError(error))
  }

  /** Waits after a failure, until the next attempt or until the server is closed. */
  async pause (): Promise<void> {
    await sleep(RETRY_MS, undefined, { signal: this.closing }).catch(() => {})
  }

  /** Never rejects, and takes 2 s at most. */
  async close (): Promise<void> {
    this.#closing.abort()
    await Promise.all(Array.from(new Set([this.web, this.#worker]), pool => pool.close()))
  }

  /** The limit for locks would outlive this call in a transaction of the caller, and what fails there says nothing of our connections. */
  async #insertWith (tx: Db, queue: string, jobs: JobInsert[]): Promise<readonly string[]> {
    try {
      const stored = this.web.boss.insert(queue, jobs, { returnId: true, db: tx })
      return await within(REQUEST_MS, stored, () => { throw new Error(`the transaction did not answer within ${REQUEST_MS} ms`) }) ?? []
    } catch (error) {
      throw plainPgError(error)
    }
  }

  async #declare (onDeclared?: () => void): Promise<void> {
    await declareQueues(this.web, this.#tasks, onDeclared)
  }

  /** Replaces every connection when the server is read-only. A call that lost its connection by that has done nothing there, either. */
  async #areReplaced (error: unknown, since: number): Promise<boolean> {
    if (this.#replacedAt < since) {
      if (!isReadOnly(error)) return false
      this.report(error)
      // There may be no other server yet.
      if (performance.now() - this.#replacedAt < RETRY_MS) return false
      this.#replacedAt = performance.now()
      this.#replacing = Promise.all([this.web.cut(), this.#worker.cut()])
    }
    await this.#replacing
    return !this.closing.aborted
  }

  /**
   * Settles as the start does, or rejects when the server is silent. A server may accept the connection and say nothing.
   * @param done counts what was done, for an executor of the user, whose connections are not known
   */
  async #unlessSilent (done: () => number, start: Promise<void>): Promise<void> {
    let timer: NodeJS.Timeout | undefined
    const silence = new Promise<never>((_resolve, reject) => {
      let seen = 0
      let since = performance.now()
      timer = setInterval(() => {
        const progress = this.web.received + done()
        const limit = this.web.isOwn && progress === 0 ? CONNECT_MS : SILENCE_MS
        if (progress !== seen) since = performance.now()
        else if (performance.now() - since >= limit) reject(new Error(`the server did not answer within ${limit} ms`))
        seen = progress
      }, CONNECT_MS / 8)
    })
    start.catch(() => {})
    try {
      await Promise.race([start, silence])
    } finally {
      clearInterval(timer)
    }
  }
}

/** Two statements without values travel as one message, and form one transaction. pg answers with a result for each. */
function fetching (pool: Pool): Db {
  return {
    async executeSql (text, values) {
      if (!pool.isOwn) return await pool.db.executeSql(fetchAnew(text), values)
      const results = await pool.executeOnce(`${IN_INDEX_ORDER};${fetchAnew(text)}`) as unknown as Array<{ rows: unknown[] }>
      return { rows: results.at(-1)?.rows ?? [] }
    }
  }
}

/** Seconds between two searches for records whose time is over. They go at most a quarter of that time late. */
function sweepSeconds (tasks: readonly TaskSpec[]): number {
  const shortest = Math.min(...tasks.flatMap(({ keep }) => [keep.succeeded, keep.failed]))
  return Math.min(Math.max(Math.floor(shortest / 4), 1), 900)
}
