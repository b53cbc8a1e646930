/**
 * Background tasks on Redis, with BullMQ.
 *
 * @module bullmq
 */
import { Queue, type JobsOptions, type QueueOptions, type WorkerOptions } from 'bullmq'
import { Redis, type ChainableCommander, type RedisOptions } from 'ioredis'
import { FST_BGT_INVALID_OPTION } from '../../errors.js'
import { within } from '../../limits.js'
import { check, NAME, SECRET_OBJECT, type Rules } from '../../rules.js'
import { cork } from '../cork.js'
import type { Delivery, EngineEvents, Job, JobRecord, Receipt, TaskEngine, TaskSpec, Verdict } from '../engine.js'
import { isExpired, JsonData, JsonJob, readRecord, toJobOptions, type TaskQueue } from './records.js'
import { TaskWorker } from './worker.js'

/** What is set by definitions, by the engine's own options, or by the promises of an engine. */
const RESERVED = {
  queue: ['connection', 'prefix', 'telemetry'],
  worker: [
    'connection', 'prefix', 'concurrency', 'autorun', 'removeOnComplete', 'removeOnFail', 'maxStalledCount', 'maxStartedAttempts',
    'skipStalledCheck', 'skipLockRenewal'
  ]
} as const

/** Options of `bullmq()`. A wrong value throws `FST_BGT_INVALID_OPTION` there. */
export interface BullMqOptions {
  /**
   * The Redis server: a `redis:` or `rediss:` URL, or options of ioredis. It should run with `maxmemory-policy noeviction`,
   * and with `appendonly yes` if jobs are to outlive a crash of it.
   * @default 'redis://127.0.0.1:6379'
   */
  readonly connection?: string | RedisOptions | undefined

  /**
   * What all keys begin with, as BullMQ's own `prefix`: dashboards need it too.
   * @default 'fbt'
   */
  readonly prefix?: string | undefined

  /** What BullMQ's `Queue` and `Worker` take beside. `lockDuration` and `stalledInterval` decide when a crash is noticed. */
  readonly options?: {
    /** Without what definitions and the engine set. */
    readonly queue?: Omit<Partial<QueueOptions>, typeof RESERVED.queue[number]> | undefined
    /** Without what definitions and the engine set. */
    readonly worker?: Omit<Partial<WorkerOptions>, typeof RESERVED.worker[number]> | undefined
  } | undefined
}

const RULES: Rules = {
  connection: { accepts: 'a redis: or rediss: URL, or an object of options of ioredis, without keyPrefix', holds: isConnection, isSecret: true },
  prefix: NAME,
  options: SECRET_OBJECT
}
const OPTIONS_RULES: Rules = { queue: SECRET_OBJECT, worker: SECRET_OBJECT }

/** Milliseconds within which the server has to answer when the app starts. */
const START_MS = 1500
/** Milliseconds for one attempt to connect, unless the options say otherwise. */
const CONNECT_MS = 2000
/** Milliseconds without a reply after which a connection counts as lost. */
const SILENCE_MS = 5000
/** Milliseconds for saying goodbye. */
const GOODBYE_MS = 500
/** Requests whose jobs leave each by itself, at once: of ten that waited for the end of the turn, a seventh of the rate was lost. */
const FEW = 8

/**
 * Durable jobs in Redis 6.2 or later, by BullMQ 6. A definition is a queue of its name. Supports `delay`, `key` and `get`.
 * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value
 */
export function bullmq (options: BullMqOptions = {}): TaskEngine {
  checkOptions(options)
  return new BullMqEngine(options)
}

class BullMqEngine implements TaskEngine {
  readonly name = 'bullmq'
  readonly supports = { delay: true, key: true, tx: false, get: true } as const
  readonly groups = false
  readonly #options: BullMqOptions
  readonly #prefix: string
  readonly #report = (error: Error): void => { this.#events?.error(plain(error)) }
  #events: EngineEvents | undefined
  /** Of the producer's connection. */
  #lastError: Error | undefined
  #tasks = new Map<string, { readonly spec: TaskSpec, readonly queue: TaskQueue }>()
  #workers: TaskWorker[] = []
  #producer: Redis | undefined
  #consumer: Redis | undefined
  #heartbeat: NodeJS.Timeout | undefined
  /** Calls of `enqueue`. */
  #underWay = 0

  constructor (options: BullMqOptions) {
    this.#options = options
    this.#prefix = options.prefix ?? 'fbt'
  }

  async start (tasks: readonly TaskSpec[], events: EngineEvents): Promise<void> {
    // Rejects what cannot be sent, and what had no reply when the connection was lost: sent again, it might wait for ever.
    const producer = this.#connect({ enableOfflineQueue: false, maxRetriesPerRequest: 0, lazyConnect: true, socketTimeout: SILENCE_MS })
    this.#producer = producer
    this.#lastError = undefined
    producer.on('error', error => {
      this.#lastError = error
      this.#report(error)
    })
    try {
      await answered(START_MS, this.#open(producer, tasks))
    } catch (error) {
      const reason = this.#explain(error)
      await this.stop({ drainMs: 0 })
      throw reason
    }
    this.#events = events
  }

  async enqueue (jobs: readonly Job[]): Promise<Receipt[]> {
    const [job] = jobs
    // The connection is there since `start`.
    if (this.#underWay++ >= FEW || jobs.length > 1) cork((this.#producer as Redis).stream)
    try {
      if (job !== undefined && jobs.length === 1) return [await this.#add(job)]
      // Written one by one, they leave together all the same: as fast as `addBulk`, for less processor time.
      return await Promise.all(jobs.map(job => this.#add(job)))
    } catch (error) {
      throw this.#explain(error)
    } finally {
      this.#underWay--
    }
  }

  async consume (run: (delivery: Delivery) => Promise<Verdict>): Promise<void> {
    const options = this.#options.options?.worker
    const consumer = this.#connect({ maxRetriesPerRequest: null, lazyConnect: false })
    this.#consumer = consumer
    this.#heartbeat = setInterval(() => { void reconnectIfSilent(consumer) }, SILENCE_MS).unref()
    // Workers tell of it.
    consumer.on('error', () => {})
    for (const { spec } of this.#tasks.values()) {
      this.#workers.push(new TaskWorker({ task: spec, connection: consumer, prefix: this.#prefix, options, run, onError: this.#report }))
    }
  }

  async pause (): Promise<void> {
    await Promise.all(this.#workers.map(worker => worker.pause(true)))
  }

  async get (task: string, id: string): Promise<JobRecord | undefined> {
    const { spec, queue } = this.#task(task)
    try {
      return await readRecord(this.#producer as Redis, queue, spec, id)
    } catch (error) {
      throw this.#explain(error)
    }
  }

  async stop ({ drainMs }: { readonly drainMs: number }): Promise<void> {
    this.#events = undefined
    clearInterval(this.#heartbeat)
    await this.pause()
    await answered(drainMs, Promise.all(this.#workers.map(worker => worker.settled()))).catch(() => {})
    await answered(GOODBYE_MS, Promise.all(this.#workers.map(worker => worker.close(true)))).catch(() => {})
    await Promise.all([...this.#tasks.values()].map(({ queue }) => queue.close())).catch(() => {})
    await Promise.all([close(this.#producer), close(this.#consumer)])
    this.#tasks = new Map()
    this.#workers = []
  }

  /** What ioredis says of a command that it cannot send does not tell why. */
  #explain (error: unknown): Error {
    if (this.#producer?.status === 'ready') return plain(error)
    return new Error(`There is no connection to Redis: ${plain(this.#lastError ?? error).message}`)
  }

  #task (name: string): { readonly spec: TaskSpec, readonly queue: TaskQueue } {
    const task = this.#tasks.get(name)
    if (task === undefined) throw new Error(`The engine was not started with a task "${name}"`)
    return task
  }

  #connect (own: RedisOptions): Redis {
    const { connection = 'redis://127.0.0.1:6379' } = this.#options
    // BullMQ reads replies as Redis 6 and before shaped them.
    const fixed = { ...own, retryStrategy, disconnectTimeout: GOODBYE_MS, replyMapping: 'legacy' } as const
    if (typeof connection === 'string') return new Redis(connection, { connectTimeout: CONNECT_MS, ...fixed })
    return new Redis({ connectTimeout: CONNECT_MS, ...connection, ...fixed })
  }

  async #open (producer: Redis, tasks: readonly TaskSpec[]): Promise<void> {
    await producer.connect()
    for (const spec of tasks) {
      const queue: TaskQueue = new Queue(spec.name, { ...this.#options.options?.queue, connection: producer, prefix: this.#prefix })
      // The connection's own listener has heard it.
      queue.on('error', () => {})
      this.#tasks.set(spec.name, { spec, queue })
    }
    await Promise.all([...this.#tasks.values()].map(({ queue }) => queue.waitUntilReady()))
  }

  async #add (job: Job): Promise<Receipt> {
    if (job.keyed) return await this.#addKeyed(job)
    // What `queue.add` does beside (an event, a span) would cost 5 % more of processor time than in a handler of one's own.
    await JsonJob.create(this.#task(job.task).queue, job.task, new JsonData(job), this.#jobOptions(job))
    return { id: job.id, duplicate: false }
  }

  #jobOptions (job: Job): JobsOptions {
    const defaults = this.#options.options?.queue?.defaultJobOptions
    return defaults === undefined ? toJobOptions(job) : { ...defaults, ...toJobOptions(job) }
  }

  /** BullMQ keeps silent about a job that is there already: whether it is, is asked in the same transaction. */
  async #addKeyed (job: Job): Promise<Receipt> {
    const { id } = job
    const { spec: { keep }, queue } = this.#task(job.task)
    const client = await queue.getBackend().client
    const transaction = client.multi()
    // ioredis it is, of which BullMQ's type declares what BullMQ uses.
    const reads = transaction as unknown as ChainableCommander
    reads.exists(queue.toKey(id)).zscore(queue.toKey('completed'), id).zscore(queue.toKey('failed'), id)
    await new JsonJob(queue, job.task, new JsonData(job), this.#jobOptions(job), id).addJob(transaction)
    const [exists, succeededAt, failedAt] = await replies(transaction)
    if (exists === 0) return { id, duplicate: false }
    // A record past its time is there until someone looks.
    if (isExpired(succeededAt, keep.succeeded)) await queue.clean(keep.succeeded * 1000, 0, 'completed')
    else if (isExpired(failedAt, keep.failed)) await queue.clean(keep.failed * 1000, 0, 'failed')
    else return { id, duplicate: true }
    return await this.#addKeyed(job)
  }
}

/** Without end, and soon: a job that cannot be stored is a 503. */
function retryStrategy (times: number): number {
  return Math.min(times * 50, 1000)
}

/** What ioredis has for it, `socketTimeout`, would take 4 % of the rate at which jobs run. BullMQ looks after its waits itself. */
async function reconnectIfSilent (redis: Redis): Promise<void> {
  if (redis.status === 'ready') await answered(SILENCE_MS, redis.ping()).catch(() => { redis.disconnect(true) })
}

/** Rejects with the first error of a transaction. */
async function replies (transaction: { exec: () => Promise<Array<[Error | null, unknown]> | null> }): Promise<unknown[]> {
  const results = await transaction.exec() ?? []
  return results.map(([error, reply]) => {
    if (error !== null) throw error
    return reply
  })
}

async function close (redis: Redis | undefined): Promise<void> {
  if (redis?.status === 'ready') await answered(GOODBYE_MS, redis.quit()).catch(() => {})
  redis?.disconnect()
}

/** An error of ioredis carries the command and its arguments, payloads among them: its message alone goes on. */
function plain (error: unknown): Error {
  const { message, code, previousErrors } = error as Partial<NodeJS.ErrnoException & { previousErrors: Error[] }>
  // Of a transaction: why it was discarded.
  if (previousErrors?.[0] !== undefined) return plain(previousErrors[0])
  // Node gives several attempts to connect one error without a message. Redis repeats arguments of a command it does not know.
  return new Error((message || code || String(error)).replace(/, with args beginning with: .*/s, ''))
}

async function answered<T> (milliseconds: number, promise: Promise<T>): Promise<T> {
  return await within(milliseconds, promise, () => { throw new Error(`it did not answer within ${milliseconds} ms`) })
}

function checkOptions (options: BullMqOptions): void {
  check('bullmq', options, RULES)
  if (options.options === undefined) return
  check('"options" of bullmq', options.options, OPTIONS_RULES)
  for (const kind of ['queue', 'worker'] as const) {
    const passed = options.options[kind] ?? {}
    const reserved = RESERVED[kind].find(name => Object.hasOwn(passed, name))
    if (reserved !== undefined) throw new FST_BGT_INVALID_OPTION(`The option "options.${kind}" of bullmq does not accept "${reserved}": the engine sets it`)
  }
}

function isConnection (connection: unknown): boolean {
  if (typeof connection === 'string') return URL.canParse(connection) && /^rediss?:$/.test(new URL(connection).protocol)
  return typeof connection === 'object' && connection !== null && !Array.isArray(connection) &&
    !(connection instanceof Redis) && !('keyPrefix' in connection)
}
