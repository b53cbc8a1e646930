/**
 * Background tasks on PostgreSQL, with pg-boss.
 *
 * @module pg-boss
 */
import { AssertionError } from 'node:assert'
import { PgBoss } from 'pg-boss'
// A CommonJS module may read the types of an ES module, if it says so.
import type { ConstructorOptions } from 'pg-boss' with { 'resolution-mode': 'import' }
import { FST_BGT_INVALID_OPTION, FST_BGT_INVALID_PAYLOAD } from '../../errors.js'
import { check, NAME, OBJECT, SECRET_OBJECT, type Rules } from '../../rules.js'
import type { Delivery, EngineEvents, Job, JobCounts, JobQuery, JobRecord, Receipt, TaskEngine, TaskSpec, Verdict } from '../engine.js'
import { messageOf } from '../plain-error.js'
import { isUnstorable } from './errors.js'
import { EndListener } from './ends.js'
import { addedAt, payloadOf, toInsert, toRecord } from './jobs.js'
import { Holds } from './holds.js'
import { cancelJob, countJobs, findRecords, isJobId, retryJob } from './operations.js'
import { PgBossServer } from './server.js'
import { LOCK_MS } from './texts.js'
import { PgBossWorker } from './worker.js'

/** A transaction of the caller: jobs stored with it are visible after its commit, and gone after its rollback. */
export interface PgBossTx {
  /** Runs one statement, with `$1`, `$2`, … for its values. */
  executeSql (text: string, values?: unknown[]): Promise<{ rows: unknown[] }>
}

/** What runs the statements in place of a pool of pg-boss's own: what its `fromPglite`, `fromKnex` and the like return. */
export interface PgBossDb extends PgBossTx {
  /** Listens on a channel of Postgres, so that jobs of other processes are seen immediately. */
  listen?(channel: string, onNotification: (payload: string) => void, onReconnect: () => void): Promise<{ close(): Promise<void> }>
}

/** Options of `pgBoss()`. A wrong value throws `FST_BGT_INVALID_OPTION` there. */
export interface PgBossOptions {
  /** `postgres://user:password@host/database`. Either this, `db`, or the parts of it in `options`. */
  readonly connectionString?: string
  /**
   * An executor of yours, which you close yourself, for example `fromPglite(pglite)` with `options: { backend: 'pglite' }`. Without
   * its `listen`, jobs of other processes are seen within half a second.
   */
  readonly db?: PgBossDb
  /**
   * The schema that holds the jobs, created if it is missing.
   * @default 'pgboss'
   */
  readonly schema?: string
  /**
   * Other options of pg-boss's constructor: `max`, `ssl`, `application_name`, … Unless they say otherwise, the instance is not
   * registered in pg-boss's list of instances, and runs no schedules.
   */
  readonly options?: Partial<ConstructorOptions>
}

/** The most bytes of a payload. `jsonb` holds 256 MB. */
const MAX_BYTES = 268_435_455
/** The most jobs that are remembered. */
const MAX_UNREPORTED = 10_000

const RULES: Rules = {
  connectionString: { accepts: 'a string such as postgres://user:password@host/database', test: isConnectionString, isSecret: true },
  db: {
    accepts: 'an object with a method executeSql(text, values)',
    test: value => OBJECT.test(value) && typeof (value as { executeSql?: unknown }).executeSql === 'function',
    isSecret: true
  },
  schema: NAME,
  options: SECRET_OBJECT
}

/**
 * Durable jobs in PostgreSQL 13 or later, by pg-boss 12. A definition is a queue of its name. Supports everything.
 *
 * A stored job is `{ payload, enqueuedAt?, headers?, requestId? }`: `boss.send('send-email', { payload })` of any other process
 * makes one too. `id` and `attempt` are the job's own, in pg-boss's columns.
 *
 * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value, or pg-boss refuses it
 */
export function pgBoss (options: PgBossOptions): TaskEngine<PgBossTx> {
  checkOptions(options)
  const config = configOf(options)
  try {
    // pg-boss connects only when it is started.
    void new PgBoss(config)
  } catch (error) {
    if (error instanceof AssertionError) throw new FST_BGT_INVALID_OPTION(`pg-boss refuses the options of pgBoss: ${error.message}`)
    throw error
  }
  return new PgBossEngine(config)
}

class PgBossEngine implements TaskEngine<PgBossTx> {
  readonly name = 'pg-boss'
  readonly supports = { delay: true, key: true, tx: true, get: true, count: true, find: true, retry: true, cancel: true }
  readonly groups = true
  readonly #config: ConstructorOptions
  #tasks: readonly TaskSpec[] = []
  #server: PgBossServer | undefined
  #worker: PgBossWorker | undefined
  #ends: EndListener | undefined
  readonly #holds = new Holds()
  /** Ids of jobs that were stored by a call that rejected, because of others. They are stored again, and are no duplicates. */
  readonly #unreported = new Set<string>()

  constructor (config: ConstructorOptions) {
    this.#config = config
  }

  async start (tasks: readonly TaskSpec[], events: EngineEvents): Promise<void> {
    await this.stop({ drainMs: 0 })
    this.#tasks = tasks
    this.#server = new PgBossServer(this.#config, tasks, events)
    await this.#server.open()
  }

  async enqueue (jobs: readonly Job[], options?: { readonly tx?: PgBossTx }): Promise<Receipt[]> {
    const ofTask = new Map<string, Job[]>()
    for (const job of jobs) {
      const others = ofTask.get(job.task)
      if (others === undefined) ofTask.set(job.task, [job])
      else others.push(job)
    }
    const stored = new Set<string>()
    if (options?.tx === undefined) {
      this.#holds.check(jobs)
      const results = await Promise.allSettled(Array.from(ofTask, ([task, group]) => this.#insert(task, group, undefined, stored)))
      const failure = results.find(result => result.status === 'rejected')
      if (failure !== undefined) {
        if (this.#unreported.size > MAX_UNREPORTED) this.#unreported.clear()
        for (const id of stored) this.#unreported.add(id)
        throw failure.reason
      }
      this.#worker?.jobsStored(jobs)
    } else {
      // A transaction has one connection, so its statements run one by one.
      for (const [task, group] of ofTask) await this.#insert(task, group, options.tx, stored)
    }
    const isNew = (id: string): boolean => stored.has(id) || this.#unreported.delete(id)
    return jobs.map(({ id, keyed }) => ({ id, duplicate: keyed && !isNew(id.toLowerCase()) }))
  }

  async consume (run: (delivery: Delivery) => Promise<Verdict>): Promise<void> {
    const server = this.#running()
    await server.openForWorker()
    const worker = new PgBossWorker(server, this.#tasks.filter(({ concurrency }) => concurrency > 0), run)
    this.#worker = worker
    await worker.start()
  }

  async pause (): Promise<void> {
    this.#worker?.pause()
  }

  async get (task: string, id: string, { payload } = { payload: false }): Promise<JobRecord | undefined> {
    if (!isJobId(id)) return undefined
    const job = await this.#running().find(task, id)
    if (job === undefined) return undefined
    const record = toRecord(task, this.#specOf(task).attempts, job, addedAt(job.data, job.createdOn))
    return payload ? { ...record, payload: payloadOf(task, id, job.data) } : record
  }

  async count (task: string): Promise<JobCounts> {
    return await countJobs(this.#running(), this.#specOf(task))
  }

  async find (task: string, query: JobQuery): Promise<readonly JobRecord[]> {
    return await findRecords(this.#running(), this.#specOf(task), query)
  }

  async retry (task: string, id: string): Promise<boolean> {
    const isPutBack = isJobId(id) && await retryJob(this.#running(), task, id)
    if (isPutBack) this.#worker?.jobPutBack(task)
    return isPutBack
  }

  async cancel (task: string, id: string): Promise<boolean> {
    const isCancelled = isJobId(id) && await cancelJob(this.#running(), this.#specOf(task), id)
    if (isCancelled) this.#worker?.jobCancelled(task, id)
    return isCancelled
  }

  async watch (task: string, onEnd: (ids: readonly string[]) => void): Promise<() => void> {
    this.#ends ??= new EndListener(this.#running())
    return await this.#ends.watch(task, onEnd)
  }

  get isConnected (): boolean {
    return this.#server?.reach.isReachable === true
  }

  async stop ({ drainMs }: { readonly drainMs: number }): Promise<void> {
    const server = this.#server
    const worker = this.#worker
    this.#server = undefined
    this.#worker = undefined
    this.#ends?.close()
    this.#ends = undefined
    await worker?.stop(drainMs)
    await server?.close()
  }

  /** Jobs are left out whose id exists and was not cancelled. The ids of the others are added to `stored`. */
  async #insert (task: string, jobs: readonly Job[], tx: PgBossTx | undefined, stored: Set<string>): Promise<void> {
    // Two processes that store the same keys in different orders would lock each other out.
    const isKeyed = jobs.some(({ keyed }) => keyed)
    const inOrder = isKeyed ? jobs.toSorted((a, b) => a.id < b.id ? -1 : 1) : jobs
    const lockMs = !isKeyed ? LOCK_MS.noKey : jobs.length === 1 ? LOCK_MS.oneKey : LOCK_MS.keys
    if (jobs.some(({ text }) => text.length > MAX_BYTES / 3 && Buffer.byteLength(text) > MAX_BYTES)) throw new FST_BGT_INVALID_PAYLOAD(task, 'cannot be stored by PostgreSQL: it is larger than 256 MB')
    try {
      for (const id of await this.#running().insert(task, inOrder.map(toInsert), lockMs, tx)) stored.add(id)
      // The others may be cancelled. New keys do not pay for this.
      const others = inOrder.filter(({ id }) => !stored.has(id.toLowerCase()))
      if (others.length === 0) return
      for (const id of await this.#running().insert(task, others.map(toInsert), lockMs, tx, true)) stored.add(id)
    } catch (error) {
      if (tx === undefined) this.#holds.note(jobs, error)
      if (!isUnstorable(error)) throw error
      throw new FST_BGT_INVALID_PAYLOAD(task, `cannot be stored by PostgreSQL: ${messageOf(error)}`)
    }
  }

  #specOf (task: string): TaskSpec {
    const spec = this.#tasks.find(({ name }) => name === task)
    if (spec === undefined) throw new Error(`the engine does not know the definition "${task}"`)
    return spec
  }

  #running (): PgBossServer {
    if (this.#server === undefined) throw new Error('the engine is not started')
    return this.#server
  }
}

function configOf ({ connectionString, db, schema, options }: PgBossOptions): ConstructorOptions {
  return {
    schedule: false,
    registerInstance: false,
    ...options,
    ...(connectionString !== undefined && { connectionString }),
    ...(db !== undefined && { db }),
    ...(schema !== undefined && { schema })
  }
}

function checkOptions (options: PgBossOptions): void {
  check('pgBoss', options, RULES)
  const { connectionString, db, options: others } = options
  if (connectionString !== undefined && db !== undefined) {
    throw new FST_BGT_INVALID_OPTION('pgBoss accepts either connectionString or db; received both')
  }
  if (connectionString === undefined && db === undefined && others === undefined) {
    throw new FST_BGT_INVALID_OPTION('pgBoss needs one of connectionString, db and options; received none')
  }
}

/** pg accepts more than URLs, but a URL has to be one of PostgreSQL. */
function isConnectionString (value: unknown): boolean {
  if (!NAME.test(value)) return false
  const text = value as string
  return !URL.canParse(text) || /^(?:postgres|postgresql|socket):$/.test(new URL(text).protocol)
}
