/**
 * Background tasks on RabbitMQ, with amqplib.
 *
 * @module rabbitmq
 */
import { FST_BGT_INVALID_PAYLOAD } from '../../errors.js'
import { within } from '../../limits.js'
import type { Delivery, EngineEvents, Job, JobCounts, JobRecord, Receipt, TaskEngine, TaskSpec, Verdict } from '../engine.js'
import { RabbitMqConnection, type RabbitMqConnectionOptions } from './connection.js'
import { RabbitMqConsumer } from './consumer.js'
import { FailedJobs } from './failed-jobs.js'
import { toContent, toProperties } from './messages.js'
import { checkOptions, urlsOf, type RabbitMqOptions } from './options.js'
import { RabbitMqPublisher, TooLargeError } from './publisher.js'
import { readyIn, readyWhenReturned } from './queue-state.js'
import { RabbitMqQueues } from './queues.js'

export type { RabbitMqOptions } from './options.js'

/** Milliseconds between two looks at what is under way. */
const TICK_MS = 500
/** Ticks without a job after which a consumer may have been forgotten by the server. */
const QUIET_TICKS = 20
/** Ticks between two consumers that subscribe anew because they are quiet. */
const RENEWAL_TICKS = 10

/**
 * Durable jobs in RabbitMQ 3.10 or later, by amqplib. A definition is a queue of its name, after the prefix. Supports `delay`, `count` and `retry`.
 * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value
 */
export function rabbitmq (options: RabbitMqOptions = {}): TaskEngine {
  checkOptions(options)
  return new RabbitMqEngine(options)
}

class RabbitMqEngine implements TaskEngine {
  readonly name = 'rabbitmq'
  readonly supports = { delay: true, key: false, tx: false, get: false, count: true, find: false, retry: true, cancel: false } as const
  readonly groups = false
  readonly #urls: readonly string[]
  readonly #prefix: string
  readonly #socket: RabbitMqOptions['options']
  readonly #report = (error: Error): void => { this.#events?.error(error) }
  #events: EngineEvents | undefined
  #tasks: readonly TaskSpec[] = []
  #queues!: RabbitMqQueues
  #publisher!: RabbitMqPublisher
  /** A connection of its own: a server that is short of memory or disk stops reading from connections that publish, and acknowledgements still get through here. */
  #consuming: RabbitMqConnection | undefined
  #publishing: RabbitMqConnection | undefined
  #consumers: RabbitMqConsumer[] = []
  /** The failed jobs of each definition, by its name. */
  #failed: ReadonlyMap<string, FailedJobs> = new Map()
  /** The connection whose loss was reported last. */
  #reported: RabbitMqConnection | undefined
  #timer: NodeJS.Timeout | undefined
  #ticks = 0

  constructor (options: RabbitMqOptions) {
    this.#urls = urlsOf(options)
    this.#prefix = options.prefix ?? 'fbt'
    this.#socket = options.options
  }

  async start (tasks: readonly TaskSpec[], events: EngineEvents): Promise<void> {
    const queues = new RabbitMqQueues(this.#prefix, tasks, events.log)
    const publisher: RabbitMqPublisher = new RabbitMqPublisher(queues, () => connection, events.log)
    const connection = this.#connection('publisher', model => publisher.setUp(model))
    this.#publishing = connection
    await connection.open()
    this.#tasks = tasks
    this.#queues = queues
    this.#publisher = publisher
    this.#failed = new Map(tasks.map(({ name }) => [name, new FailedJobs(name, { queues, publisher, model: () => connection.model })]))
    this.#events = events
    this.#timer = setInterval(() => { this.#tick() }, TICK_MS).unref()
  }

  async enqueue (jobs: readonly Job[]): Promise<Receipt[]> {
    const store = async (job: Job): Promise<void> => {
      try {
        await this.#publish(job)
      } catch (error) {
        throw error instanceof TooLargeError ? new FST_BGT_INVALID_PAYLOAD(job.task, `cannot be stored: it ${error.message}`) : error
      }
    }
    const [job] = jobs
    if (job !== undefined && jobs.length === 1) await store(job)
    else await Promise.all(jobs.map(store))
    return jobs.map(({ id }) => ({ id, duplicate: false }))
  }

  async consume (run: (delivery: Delivery) => Promise<Verdict>): Promise<void> {
    const [queues, publisher] = [this.#queues, this.#publisher]
    this.#consumers = this.#tasks.filter(({ concurrency }) => concurrency > 0).map(spec => new RabbitMqConsumer({ spec, queues, publisher, run, onError: this.#report }))
    this.#consuming = this.#connection('consumer', async model => {
      model.once('close', () => { for (const consumer of this.#consumers) consumer.detach() })
      for (const consumer of this.#consumers) consumer.attach(model)
    })
    this.#consuming.keepOpening()
  }

  async pause (): Promise<void> {
    await Promise.all(this.#consumers.map(consumer => consumer.pause()))
  }

  async get (): Promise<JobRecord | undefined> {
    return undefined
  }

  /** Jobs that wait for their delay or their next attempt are not counted: they are in queues that all definitions share. */
  async count (task: string): Promise<JobCounts> {
    const queues = this.#queues
    const model = this.#publishing?.model
    if (model === undefined) throw new Error('the engine was stopped')
    const [pending, failed] = await Promise.all([readyIn(model, queues.queueOf(task)), readyWhenReturned(model, queues.deadQueueOf(task))])
    return { pending, failed }
  }

  async retry (task: string, id: string): Promise<boolean> {
    return await this.#failed.get(task)?.retry(id) === true
  }

  get isConnected (): boolean {
    return this.#publishing?.isOpen === true
  }

  async stop ({ drainMs }: { readonly drainMs: number }): Promise<void> {
    this.#events = undefined
    clearInterval(this.#timer)
    const drained = this.pause().then(() => Promise.all(this.#consumers.map(consumer => consumer.idle())))
    await within<unknown>(drainMs, drained, () => undefined)
    await Promise.all([this.#consuming?.close(), this.#publishing?.close()])
    this.#consuming = this.#publishing = this.#reported = undefined
    this.#consumers = []
  }

  #publish (job: Job): Promise<void> {
    const queue = this.#queues.queueOf(job.task)
    const content = toContent(job)
    if (job.delayMs > 0) return this.#publisher.publishLater(queue, job.delayMs, content, waitMs => toProperties(job, waitMs))
    return this.#publisher.publish(this.#queues.addressOf(queue), content, toProperties(job, 0))
  }

  #connection (role: string, setUp: RabbitMqConnectionOptions['setUp']): RabbitMqConnection {
    const connection = new RabbitMqConnection({
      urls: this.#urls,
      socket: this.#socket,
      name: `fastify-background-tasks ${this.#prefix} ${role}`,
      setUp,
      onError: error => {
        // What ends one connection mostly ends the other one, too.
        const isSameOutage = this.#reported !== undefined && this.#reported !== connection && !this.#reported.isOpen
        if (isSameOutage) return
        this.#reported = connection
        this.#report(error)
      }
    })
    return connection
  }

  #tick (): void {
    this.#ticks++
    this.#publisher.tick()
    for (const consumer of this.#consumers) consumer.tick()
    if (this.#ticks % RENEWAL_TICKS === 0) this.#renewQuietest()
  }

  /**
   * RabbitMQ 3.10 does not tell the consumer of a quorum queue that the queue was deleted and immediately declared again. The jobs that are
   * handed to this consumer are then lost on the way until its channel closes, and the server's counts of messages and consumers look right.
   * So the consumer that has been quiet for the longest time takes another channel.
   */
  #renewQuietest (): void {
    let quietest: RabbitMqConsumer | undefined
    for (const consumer of this.#consumers) {
      if (consumer.hasRoom && consumer.quietTicks >= QUIET_TICKS && consumer.quietTicks > (quietest?.quietTicks ?? 0)) quietest = consumer
    }
    quietest?.renew()
  }
}
