/**
 * Background tasks on RabbitMQ, with amqplib.
 *
 * @module rabbitmq
 */
import type { SocketOptions } from 'amqplib'
import { FST_BGT_INVALID_OPTION } from '../../errors.js'
import { within } from '../../limits.js'
import { check, NAME, SECRET_OBJECT, type Rules } from '../../rules.js'
import type { Delivery, EngineEvents, Job, JobRecord, Receipt, TaskEngine, TaskSpec, Verdict } from '../engine.js'
import { RabbitMqConnection, type RabbitMqConnectionOptions } from './connection.js'
import { RabbitMqConsumer } from './consumer.js'
import { toContent, toProperties } from './messages.js'
import { RabbitMqPublisher } from './publisher.js'
import { RabbitMqQueues } from './queues.js'

/** Options of `rabbitmq()`. A wrong value throws `FST_BGT_INVALID_OPTION` there. */
export interface RabbitMqOptions {
  /**
   * The server: an `amqp:` or `amqps:` URL. Its parameter `heartbeat` (4 seconds if it has none) says how long either side
   * waits for a sign of life of the other: two to three times as long.
   * @default 'amqp://guest:guest@127.0.0.1:5672'
   */
  readonly url?: string | undefined

  /**
   * What the names of all queues begin with: the queue of the task `send-email` is `fbt.send-email`.
   * @default 'fbt'
   */
  readonly prefix?: string | undefined

  /** Other options of amqplib's `connect`: `ca`, `cert`, `key`, `credentials`, `clientProperties`, … */
  readonly options?: SocketOptions | undefined
}

const RULES: Rules = { url: { accepts: 'an amqp: or amqps: URL', test: isUrl, isSecret: true }, prefix: NAME, options: SECRET_OBJECT }

/** Seconds. A process whose event loop is blocked for twice as long loses its connection, and the server starts its jobs elsewhere. */
const HEARTBEAT = '4'
/** Milliseconds after which a consumer that has received nothing subscribes anew. */
const QUIET_MS = 10_000

/**
 * Durable jobs in RabbitMQ 3.10 or later, by amqplib. A definition is a queue of its name, after the prefix. Supports `delay`.
 * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value
 */
export function rabbitmq (options: RabbitMqOptions = {}): TaskEngine {
  checkOptions(options)
  return new RabbitMqEngine(options)
}

class RabbitMqEngine implements TaskEngine {
  readonly name = 'rabbitmq'
  readonly supports = { delay: true, key: false, tx: false, get: false } as const
  readonly groups = false
  readonly #options: RabbitMqOptions
  readonly #report = (error: Error): void => { this.#events?.error(error) }
  #events: EngineEvents | undefined
  #tasks: readonly TaskSpec[] = []
  #queues!: RabbitMqQueues
  #publisher!: RabbitMqPublisher
  /** A connection of its own: a server that is short of memory or disk stops reading from connections that publish, and acknowledgements still get through here. */
  #consuming: RabbitMqConnection | undefined
  #publishing: RabbitMqConnection | undefined
  #consumers: RabbitMqConsumer[] = []
  #quietTimer: NodeJS.Timeout | undefined

  constructor (options: RabbitMqOptions) {
    this.#options = options
  }

  async start (tasks: readonly TaskSpec[], events: EngineEvents): Promise<void> {
    const queues = new RabbitMqQueues(this.#options.prefix ?? 'fbt', tasks, events.log)
    const publisher: RabbitMqPublisher = new RabbitMqPublisher(queues, () => connection)
    const connection = this.#connection('publisher', model => publisher.setUp(model))
    this.#publishing = connection
    await connection.open()
    this.#tasks = tasks
    this.#queues = queues
    this.#publisher = publisher
    this.#events = events
  }

  async enqueue (jobs: readonly Job[]): Promise<Receipt[]> {
    const [job] = jobs
    if (job !== undefined && jobs.length === 1) await this.#publish(job)
    else await Promise.all(jobs.map(job => this.#publish(job)))
    return jobs.map(({ id }) => ({ id, duplicate: false }))
  }

  async consume (run: (delivery: Delivery) => Promise<Verdict>): Promise<void> {
    const [queues, publisher] = [this.#queues, this.#publisher]
    this.#consumers = this.#tasks.map(spec => new RabbitMqConsumer({ spec, queues, publisher, run, onError: this.#report }))
    this.#consuming = this.#connection('consumer', async model => {
      await Promise.all(this.#consumers.map(consumer => consumer.setUp(model)))
    })
    await this.#consuming.keepOpening()
    this.#quietTimer = setInterval(() => { void this.#resubscribeQuiet() }, QUIET_MS).unref()
  }

  async pause (): Promise<void> {
    clearInterval(this.#quietTimer)
    await Promise.all(this.#consumers.map(consumer => consumer.pause()))
  }

  async get (): Promise<JobRecord | undefined> {
    return undefined
  }

  async stop ({ drainMs }: { readonly drainMs: number }): Promise<void> {
    this.#events = undefined
    const drained = this.pause().then(() => Promise.all(this.#consumers.map(consumer => consumer.idle())))
    await within<unknown>(drainMs, drained, () => undefined)
    await Promise.all([this.#consuming?.close(), this.#publishing?.close()])
    this.#consumers = []
  }

  #publish (job: Job): Promise<void> {
    const queue = this.#queues.queueOf(job.task)
    const content = toContent(job)
    if (job.delayMs > 0) return this.#publisher.publishLater(queue, job.delayMs, content, dueAt => toProperties(job, dueAt))
    return this.#publisher.publish({ exchange: '', routingKey: queue }, content, toProperties(job, undefined))
  }

  #connection (role: string, setUp: RabbitMqConnectionOptions['setUp']): RabbitMqConnection {
    const { url = 'amqp://guest:guest@127.0.0.1:5672', options, prefix = 'fbt' } = this.#options
    return new RabbitMqConnection({ url: withHeartbeat(url), socket: options, name: `fastify-background-tasks ${prefix} ${role}`, setUp, onError: this.#report })
  }

  async #resubscribeQuiet (): Promise<void> {
    try {
      await Promise.all(this.#consumers.map(consumer => consumer.resubscribeIfQuiet()))
    } catch {
      // The connection was lost, which it has reported.
    }
  }
}

function withHeartbeat (url: string): string {
  const parsed = new URL(url)
  if (!parsed.searchParams.has('heartbeat')) parsed.searchParams.set('heartbeat', HEARTBEAT)
  return parsed.href
}

function checkOptions (options: RabbitMqOptions): void {
  check('rabbitmq', options, RULES)
  if (options.options === undefined || !Object.hasOwn(options.options, 'recovery')) return
  throw new FST_BGT_INVALID_OPTION('The option "options" of rabbitmq does not accept "recovery": the engine restores its connections')
}

function isUrl (url: unknown): boolean {
  return typeof url === 'string' && URL.canParse(url) && /^amqps?:$/.test(new URL(url).protocol)
}
