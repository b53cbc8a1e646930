/**
 * Background tasks on Redis, with BullMQ.
 *
 * @module bullmq
 */
import { Queue, type JobsOptions } from 'bullmq'
import { FST_BGT_INVALID_PAYLOAD } from '../../errors.js'
import { attempt } from '../../foreign.js'
import { cork } from '../cork.js'
import type { Delivery, EngineEvents, Job, JobCounts, JobQuery, JobRecord, Receipt, TaskEngine, TaskSpec, Verdict } from '../engine.js'
import { cancelJob } from './cancelled.js'
import { answered, CONNECT_MS, Connections, GOODBYE_MS, reconnectIfSilent, SILENCE_MS, type Client } from './connection.js'
import { countJobs } from './counts.js'
import { findJobs } from './find.js'
import { JsonData, JsonJob, toJobOptions, type KnownTask, type TaskQueue } from './jobs.js'
import { addKeyed } from './keyed.js'
import { checkOptions, type BullMqOptions, type CheckedOptions } from './options.js'
import { putBack } from './put-back.js'
import { readJobs } from './records.js'
import { isNeverStored, isNotSent, plainRedisError } from './redis-errors.js'
import { checkLibrary, LARGE, readServer, SizeLimit } from './server.js'
import { StalledJobs } from './stalled-jobs.js'
import { UnservedTasks } from './unserved.js'
import { watchEnds } from './watch.js'
import { TaskWorker } from './worker.js'

export type { BullMqOptions } from './options.js'
export type { BullMqConnection, ClusterNode } from './connection-options.js'

/** Requests whose jobs leave one by one: when ten requests waited for the end of the turn, a seventh of the rate was lost. */
const MAX_UNCORKED = 8
/** Milliseconds between two looks for jobs whose process died. */
const STALLED_MS = 2000
/** Milliseconds for which a server that refused a write counts as away. Nothing else tells when it takes writes again. */
const REFUSED_MS = 2000
/** Entries of a queue's stream of events. They are read only while somebody waits for a result, and they hold the results of jobs. */
const MAX_EVENTS = 10

/**
 * Durable jobs in Redis 6.2 or later, by BullMQ 6. A definition is a queue of its name. Supports all but `tx`.
 * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value
 */
export function bullmq (options: BullMqOptions = {}): TaskEngine {
  return new BullMqEngine(checkOptions(options))
}

class BullMqEngine implements TaskEngine {
  readonly name = 'bullmq'
  readonly supports = { delay: true, key: true, tx: false, get: true, count: true, find: true, retry: true, cancel: true } as const
  readonly groups = false
  readonly #options: CheckedOptions
  /** Reports an error, unless it follows from an outage that was reported. */
  readonly #report = (error: Error): void => {
    if (!this.#isAway || error.name === 'ReplyError') this.#events?.error(plainRedisError(error))
  }

  #events: EngineEvents | undefined
  /** Whether the producer has lost its connection. */
  #isAway = false
  /** When the server last refused a write, by `performance.now()`. */
  #refusedAt = -Infinity
  /** The last error of the producer's connection. */
  #lastError: Error | undefined
  #tasks = new Map<string, KnownTask>()
  #workers: TaskWorker[] = []
  #connections: Connections | undefined
  #producer: Client | undefined
  /** What looks at the connections and the jobs again and again. */
  #watches: Array<() => void> = []
  /** What ends each of the calls of `watch`. */
  readonly #unwatches = new Set<() => void>()
  #sizes: SizeLimit | undefined
  /** Calls of `enqueue` that have not settled. */
  #enqueueCalls = 0

  constructor (options: CheckedOptions) {
    this.#options = options
  }

  async start (tasks: readonly TaskSpec[], events: EngineEvents): Promise<void> {
    this.#isAway = false
    this.#refusedAt = -Infinity
    this.#lastError = undefined
    this.#connections = new Connections(this.#options.place, error => {
      this.#lastError = error
      this.#refusedAt = performance.now()
      this.#report(error)
    })
    const producer = this.#connections.open({ rejectsEarly: true })
    this.#producer = producer
    this.#sizes = new SizeLimit(producer)
    let isOpening = true
    producer.on('error', error => {
      if (!isNotSent(error)) this.#lastError = error
      // ioredis goes on trying while this method waits.
      if (isOpening) events.error(this.#explain(error))
      else this.#report(error)
      this.#isAway = error.name !== 'ReplyError'
    })
    producer.on('ready', () => { this.#isAway = false })
    try {
      await this.#open(producer, tasks, events)
      this.#events = events
    } catch (error) {
      const reason = this.#explain(error)
      await this.stop({ drainMs: 0 })
      throw reason
    } finally {
      isOpening = false
    }
  }

  async enqueue (jobs: readonly Job[]): Promise<Receipt[]> {
    const [job] = jobs
    // `start` has made the connection.
    if (this.#enqueueCalls++ >= MAX_UNCORKED || jobs.length > 1) corkAll(this.#producer as Client)
    try {
      if (job !== undefined && jobs.length === 1) return [await this.#add(job)]
      // The jobs are written one by one and leave together all the same: as fast as `addBulk`, for less processor time.
      return await Promise.all(jobs.map(job => this.#add(job)))
    } catch (error) {
      throw error instanceof FST_BGT_INVALID_PAYLOAD ? error : this.#explain(error)
    } finally {
      this.#enqueueCalls--
    }
  }

  async consume (run: (delivery: Delivery) => Promise<Verdict>): Promise<void> {
    const { prefix, worker: { stalledInterval = STALLED_MS, ...options } } = this.#options
    // `start` has made them.
    const [connections, events, sizes] = [this.#connections as Connections, this.#events as EngineEvents, this.#sizes as SizeLimit]
    const consumer = connections.open({ rejectsEarly: false })
    for (const known of this.#tasks.values()) {
      const { spec } = known
      if (spec.concurrency === 0) continue
      this.#workers.push(connections.forTask(spec.name, () => new TaskWorker({
        task: spec,
        connection: consumer,
        prefix,
        // BullMQ carries out one look per queue and interval, and passes over the others.
        options: { ...options, stalledInterval: Math.max(1, Math.floor(stalledInterval / 2)) },
        run,
        sizes,
        log: events.log,
        cancel: async id => await cancelJob(consumer, known, id),
        onCancelled: id => { events.cancelled(spec.name, id) },
        onError: this.#report
      })))
    }
    const stalledJobs = new StalledJobs(consumer, this.#workers, stalledInterval, this.#report)
    const unserved = new UnservedTasks(consumer, connections, events.log)
    const silenceCheck = setInterval(() => { void reconnectIfSilent(consumer) }, SILENCE_MS).unref()
    this.#watches = [() => { stalledJobs.stop() }, () => { unserved.stop() }, () => { clearInterval(silenceCheck) }]
  }

  async pause (): Promise<void> {
    await Promise.all(this.#workers.map(worker => worker.pause(true)))
  }

  async get (task: string, id: string, { payload } = { payload: false }): Promise<JobRecord | undefined> {
    return await this.#ask(task, async (redis, known) => (await readJobs(redis, known, [id], payload))[0]?.record)
  }

  async count (task: string): Promise<JobCounts> {
    return await this.#ask(task, countJobs)
  }

  async find (task: string, query: JobQuery): Promise<readonly JobRecord[]> {
    return await this.#ask(task, async (redis, known) => await findJobs(redis, known, query))
  }

  async retry (task: string, id: string): Promise<boolean> {
    return await this.#ask(task, async (redis, known) => await putBack(redis, known, id))
  }

  async cancel (task: string, id: string): Promise<boolean> {
    return await this.#ask(task, async (redis, known) => await cancelJob(redis, known, id))
  }

  async watch (task: string, onEnd: (ids: readonly string[]) => void): Promise<() => void> {
    const { queue } = this.#task(task)
    // Its connection would wait for the server, and be joined by others.
    if (!this.isConnected) throw this.#explain(undefined)
    const end = watchEnds(this.#producer as Client, queue, this.#options.prefix, onEnd)
    const unwatch = (): void => {
      this.#unwatches.delete(unwatch)
      end()
    }
    this.#unwatches.add(unwatch)
    return unwatch
  }

  get isConnected (): boolean {
    return this.#producer?.status === 'ready' && !this.#isAway && performance.now() - this.#refusedAt > REFUSED_MS
  }

  async stop ({ drainMs }: { readonly drainMs: number }): Promise<void> {
    this.#events = undefined
    for (const stop of [...this.#watches, ...this.#unwatches]) stop()
    await this.pause()
    await answered(drainMs, Promise.all(this.#workers.map(worker => worker.idle()))).catch(() => {})
    // Jobs that were fetched too late go back to the queue.
    this.#connections?.endWaits()
    await answered(GOODBYE_MS, Promise.all(this.#workers.map(worker => worker.fetchLoop))).catch(() => {})
    await answered(GOODBYE_MS, Promise.all(this.#workers.map(worker => worker.close(true)))).catch(() => {})
    await answered(GOODBYE_MS, Promise.all([...this.#tasks.values()].map(({ queue }) => queue.close()))).catch(() => {})
    await this.#connections?.close()
    this.#tasks = new Map()
    this.#workers = []
    this.#watches = []
  }

  /** ioredis rejects a command that it cannot send, and does not say why there is no connection. */
  #explain (error: unknown): Error {
    if (this.#producer?.status === 'ready' && !isNotSent(error)) return plainRedisError(error)
    return new Error(`There is no connection to Redis: ${plainRedisError(this.#lastError ?? error).message}`)
  }

  async #ask<T> (task: string, question: (redis: Client, known: KnownTask) => Promise<T>): Promise<T> {
    const known = this.#task(task)
    try {
      return await question(this.#producer as Client, known)
    } catch (error) {
      throw this.#explain(error)
    }
  }

  #task (name: string): KnownTask {
    const task = this.#tasks.get(name)
    if (task === undefined) throw new Error(`The engine was not started with a task "${name}"`)
    return task
  }

  async #open (producer: Client, tasks: readonly TaskSpec[], events: EngineEvents): Promise<void> {
    const { place, prefix, queue: options } = this.#options
    // Some of the sentinels or nodes may be away, and each of these costs an attempt.
    const [addresses, { connectTimeout = CONNECT_MS }] = 'cluster' in place
      ? [place.cluster.length, place.options.redisOptions ?? {}] as const
      : [place.options.sentinels?.length ?? 1, place.options] as const
    await answered((addresses + 1) * connectTimeout, producer.connect())
    const server = await readServer(producer)
    this.#connections?.answerInfo(server.text)
    for (const spec of tasks) {
      const queue: TaskQueue = new Queue(spec.name, { streams: { events: { maxLen: MAX_EVENTS } }, ...options, connection: producer, prefix })
      // The connection's own listener reports these errors.
      queue.on('error', () => {})
      checkLibrary(queue.metaValues['version'])
      this.#tasks.set(spec.name, { spec, queue })
    }
    await answered(SILENCE_MS, Promise.all([...this.#tasks.values()].map(({ queue }) => queue.waitUntilReady())))
    if (server.evictionPolicy === undefined) return
    attempt(() => {
      events.log.warn(`background task engine "bullmq": Redis has the eviction policy ${server.evictionPolicy}, and drops jobs when its memory is full. Set maxmemory-policy noeviction`)
    })
  }

  async #add (job: Job): Promise<Receipt> {
    const data = new JsonData(job)
    const refusal = data.text.length > LARGE ? await this.#sizes?.refusal('the job', data.text) : undefined
    if (refusal !== undefined) throw new FST_BGT_INVALID_PAYLOAD(job.task, `cannot be stored: ${refusal}`)
    try {
      if (job.keyed) return await addKeyed(this.#producer as Client, this.#task(job.task), job, data, this.#jobOptions(job))
      // `queue.add` also emits an event and opens a span, for 5 % more processor time than a handler of one's own would take.
      await JsonJob.create(this.#task(job.task).queue, job.task, data, this.#jobOptions(job))
      return { id: job.id, duplicate: false }
    } catch (error) {
      throw isNeverStored(error) ? new FST_BGT_INVALID_PAYLOAD(job.task, `cannot be stored: ${plainRedisError(error).message}`) : error
    }
  }

  #jobOptions (job: Job): JobsOptions {
    const defaults = this.#options.queue.defaultJobOptions
    return defaults === undefined ? toJobOptions(job) : { ...defaults, ...toJobOptions(job) }
  }
}

/** The connections to the nodes of a cluster have a stream each. */
function corkAll (client: Client): void {
  if (!('nodes' in client)) cork(client.stream)
  else for (const node of client.nodes('master')) if (node.status === 'ready') cork(node.stream)
}
