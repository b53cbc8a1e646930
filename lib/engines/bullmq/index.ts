/**
 * Background tasks on Redis, with BullMQ.
 *
 * @module bullmq
 */
import { Queue, type JobsOptions } from 'bullmq'
import type { ChainableCommander, Redis, RedisOptions } from 'ioredis'
import { cork } from '../cork.js'
import type { Delivery, EngineEvents, Job, JobRecord, Receipt, TaskEngine, TaskSpec, Verdict } from '../engine.js'
import { answered, close, connect, GOODBYE_MS, plainRedisError, reconnectIfSilent, SILENCE_MS } from './connection.js'
import { JsonData, JsonJob, toJobOptions, type TaskQueue } from './jobs.js'
import { checkOptions, type BullMqOptions } from './options.js'
import { isExpired, readRecord } from './records.js'
import { TaskWorker } from './worker.js'

export type { BullMqOptions } from './options.js'

/** Milliseconds within which the server has to answer when the app starts. */
const START_MS = 1500
/** Requests whose jobs leave one by one: when ten requests waited for the end of the turn, a seventh of the rate was lost. */
const MAX_UNCORKED = 8

/**
 * Durable jobs in Redis 6.2 or later, by BullMQ 6. A definition is a queue of its name. Supports `delay`, `key` and `get`.
 * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value
 */
export function bullmq (options: BullMqOptions = {}): TaskEngine {
  checkOptions(options)
  return new BullMqEngine(options)
}

interface KnownTask {
  readonly spec: TaskSpec
  readonly queue: TaskQueue
}

class BullMqEngine implements TaskEngine {
  readonly name = 'bullmq'
  readonly supports = { delay: true, key: true, tx: false, get: true } as const
  readonly groups = false
  readonly #options: BullMqOptions
  readonly #prefix: string
  readonly #report = (error: Error): void => { this.#events?.error(plainRedisError(error)) }
  #events: EngineEvents | undefined
  /** The last error of the producer's connection. */
  #lastError: Error | undefined
  #tasks = new Map<string, KnownTask>()
  #workers: TaskWorker[] = []
  #producer: Redis | undefined
  #consumer: Redis | undefined
  #silenceCheck: NodeJS.Timeout | undefined
  /** Calls of `enqueue` that have not settled. */
  #enqueueCalls = 0

  constructor (options: BullMqOptions) {
    this.#options = options
    this.#prefix = options.prefix ?? 'fbt'
  }

  async start (tasks: readonly TaskSpec[], events: EngineEvents): Promise<void> {
    // This connection rejects what cannot be sent, and what had no reply when it was lost. ioredis would send that again, perhaps never.
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
    // `start` has made the connection.
    if (this.#enqueueCalls++ >= MAX_UNCORKED || jobs.length > 1) cork((this.#producer as Redis).stream)
    try {
      if (job !== undefined && jobs.length === 1) return [await this.#add(job)]
      // The jobs are written one by one and leave together all the same: as fast as `addBulk`, for less processor time.
      return await Promise.all(jobs.map(job => this.#add(job)))
    } catch (error) {
      throw this.#explain(error)
    } finally {
      this.#enqueueCalls--
    }
  }

  async consume (run: (delivery: Delivery) => Promise<Verdict>): Promise<void> {
    const options = this.#options.options?.worker
    const consumer = this.#connect({ maxRetriesPerRequest: null, lazyConnect: false })
    this.#consumer = consumer
    this.#silenceCheck = setInterval(() => { void reconnectIfSilent(consumer) }, SILENCE_MS).unref()
    // The workers report these errors.
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
    clearInterval(this.#silenceCheck)
    await this.pause()
    await answered(drainMs, Promise.all(this.#workers.map(worker => worker.idle()))).catch(() => {})
    await answered(GOODBYE_MS, Promise.all(this.#workers.map(worker => worker.close(true)))).catch(() => {})
    await Promise.all([...this.#tasks.values()].map(({ queue }) => queue.close())).catch(() => {})
    await Promise.all([close(this.#producer), close(this.#consumer)])
    this.#tasks = new Map()
    this.#workers = []
  }

  /** ioredis rejects a command that it cannot send, and does not say why there is no connection. */
  #explain (error: unknown): Error {
    if (this.#producer?.status === 'ready') return plainRedisError(error)
    return new Error(`There is no connection to Redis: ${plainRedisError(this.#lastError ?? error).message}`)
  }

  #task (name: string): KnownTask {
    const task = this.#tasks.get(name)
    if (task === undefined) throw new Error(`The engine was not started with a task "${name}"`)
    return task
  }

  #connect (own: RedisOptions): Redis {
    return connect(this.#options.connection ?? 'redis://127.0.0.1:6379', own)
  }

  async #open (producer: Redis, tasks: readonly TaskSpec[]): Promise<void> {
    await producer.connect()
    for (const spec of tasks) {
      const queue: TaskQueue = new Queue(spec.name, { ...this.#options.options?.queue, connection: producer, prefix: this.#prefix })
      // The connection's own listener reports these errors.
      queue.on('error', () => {})
      this.#tasks.set(spec.name, { spec, queue })
    }
    await Promise.all([...this.#tasks.values()].map(({ queue }) => queue.waitUntilReady()))
  }

  async #add (job: Job): Promise<Receipt> {
    if (job.keyed) return await this.#addKeyed(job)
    // `queue.add` also emits an event and opens a span, for 5 % more processor time than a handler of one's own would take.
    await JsonJob.create(this.#task(job.task).queue, job.task, new JsonData(job), this.#jobOptions(job))
    return { id: job.id, duplicate: false }
  }

  #jobOptions (job: Job): JobsOptions {
    const defaults = this.#options.options?.queue?.defaultJobOptions
    return defaults === undefined ? toJobOptions(job) : { ...defaults, ...toJobOptions(job) }
  }

  /** BullMQ does not tell that a job of this id is stored already, so the same transaction asks for it first. */
  async #addKeyed (job: Job): Promise<Receipt> {
    const { id } = job
    const { spec: { keep }, queue } = this.#task(job.task)
    const client = await queue.getBackend().client
    const transaction = client.multi()
    // The client is ioredis. BullMQ's type of it declares only what BullMQ uses.
    const reads = transaction as unknown as ChainableCommander
    reads.exists(queue.toKey(id)).zscore(queue.toKey('completed'), id).zscore(queue.toKey('failed'), id)
    await new JsonJob(queue, job.task, new JsonData(job), this.#jobOptions(job), id).addJob(transaction)
    const [exists, succeededAt, failedAt] = await repliesOf(transaction)
    if (exists === 0) return { id, duplicate: false }
    // BullMQ removes an expired record only when another job of the queue ends.
    if (isExpired(succeededAt, keep.succeeded)) await queue.clean(keep.succeeded * 1000, 0, 'completed')
    else if (isExpired(failedAt, keep.failed)) await queue.clean(keep.failed * 1000, 0, 'failed')
    else return { id, duplicate: true }
    return await this.#addKeyed(job)
  }
}

/** Rejects with the first error of a transaction. */
async function repliesOf (transaction: { exec: () => Promise<Array<[Error | null, unknown]> | null> }): Promise<unknown[]> {
  const results = await transaction.exec() ?? []
  return results.map(([error, reply]) => {
    if (error !== null) throw error
    return reply
  })
}
