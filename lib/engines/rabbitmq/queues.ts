/** The queues of the engine: one per definition, one more per definition for what has failed for good, and the queues where jobs wait. */
import type { Channel, ChannelModel, Options } from 'amqplib'
import type { FastifyBaseLogger } from 'fastify'
import type { TaskSpec } from '../engine.js'
import { onChannel } from './connection.js'

/**
 * The core counts the attempts, so the server never drops a job by itself, as RabbitMQ 4 does after 20 deliveries. The value for "never",
 * -1, is not accepted by RabbitMQ 3.10.
 */
const DELIVERY_LIMIT = 1_000_000_000
/** Milliseconds that a wait may be too long, where that saves a second wait. */
const TOLERANCE_MS = 64
const SHORTEST_MS = 16
const LONGEST_MS = 1_000 * 2 ** 20 * 15 / 8

/** Where a message is published. */
export interface Address {
  readonly exchange: string
  readonly routingKey: string
}

export class RabbitMqQueues {
  readonly #prefix: string
  readonly #tasks: readonly TaskSpec[]
  readonly #log: FastifyBaseLogger
  /** The queues for waiting that are declared, or are being declared, by the names of their exchanges. */
  readonly #waitQueues = new Map<string, Promise<unknown>>()
  /** Queues that someone else has declared, with other settings. */
  readonly #foreign = new Set<string>()

  constructor (prefix: string, tasks: readonly TaskSpec[], log: FastifyBaseLogger) {
    this.#prefix = prefix
    this.#tasks = tasks
    this.#log = log
  }

  queueOf (task: string): string {
    return `${this.#prefix}.${task}`
  }

  /** The name of the queue for what has failed for good. */
  deadQueueOf (task: string): string {
    return `${this.queueOf(task)}.dead`
  }

  async declareAll (model: ChannelModel): Promise<void> {
    this.#waitQueues.clear()
    const names = new Set(this.#tasks.map(({ name }) => name))
    const taken = this.#tasks.find(({ name }) => names.has(`${name}.dead`))
    if (taken !== undefined) throw new Error(`the task "${taken.name}.dead" would run what "${taken.name}" has failed at: rename one of them`)
    for (const { name } of this.#tasks) {
      await this.declare(model, this.deadQueueOf(name))
      await this.declare(model, this.queueOf(name))
    }
  }

  /** Declares the queue of a definition, or the queue of its failed jobs. A queue that exists with other settings is used as it is. */
  async declare (model: ChannelModel, queue: string): Promise<void> {
    if (this.#foreign.has(queue)) return
    const spec = this.#tasks.find(({ name }) => this.queueOf(name) === queue)
    const route = spec === undefined ? {} : { 'x-dead-letter-exchange': '', 'x-dead-letter-routing-key': this.deadQueueOf(spec.name) }
    try {
      await onChannel(model, channel => channel.assertQueue(queue, quorum(route)))
    } catch (error) {
      if ((error as { code?: unknown }).code !== 406) throw error
      this.#foreign.add(queue)
      this.#log.warn(`background task engine "rabbitmq": the queue "${queue}" exists with other settings, and is used as it is`)
    }
  }

  /**
   * Where to publish a message that has to wait before it comes to a queue. There is one queue for waiting per step, which all definitions
   * share. All messages of such a queue wait equally long, so none waits for another. There are eight steps to each doubling. A wait that is
   * not a step takes the longest step that fits, comes to its queue too early, and waits again for the rest.
   * @returns the address, and the milliseconds that a message waits there
   */
  async addressAfter (model: ChannelModel, queue: string, ms: number): Promise<Address & { readonly ms: number }> {
    const step = stepFor(ms)
    const exchange = `${this.#prefix}:wait:${step}`
    let declaring = this.#waitQueues.get(exchange)
    if (declaring === undefined) {
      declaring = onChannel(model, channel => declareWaitQueue(channel, exchange, step))
      this.#waitQueues.set(exchange, declaring)
      declaring.catch(() => { this.#waitQueues.delete(exchange) })
    }
    await declaring
    return { exchange, routingKey: queue, ms: step }
  }

  /** Declares again what someone has deleted. */
  async repair (model: ChannelModel, { exchange, routingKey }: Address): Promise<void> {
    this.#foreign.delete(routingKey)
    if (exchange === '') {
      await this.declare(model, routingKey)
      return
    }
    const step = Number(exchange.slice(exchange.lastIndexOf(':') + 1))
    await onChannel(model, channel => declareWaitQueue(channel, exchange, step))
  }

  /** A queue for waiting may have been deleted: each is declared again when it is needed. */
  forgetWaitQueues (): void {
    this.#waitQueues.clear()
  }
}

/** A message keeps its routing key, which is the queue that it is for. So one exchange per step leads to the wait, and the default exchange back. */
async function declareWaitQueue (channel: Channel, name: string, step: number): Promise<void> {
  await channel.assertExchange(name, 'fanout')
  await channel.assertQueue(name, quorum({ 'x-message-ttl': step, 'x-dead-letter-exchange': '' }))
  await channel.bindQueue(name, name, '')
}

/** Messages move on at least once: they leave one queue when the next one has them. The server does that only for queues that refuse messages when they are full. */
function quorum (args: Record<string, string | number>): Options.AssertQueue {
  const safe = { 'x-queue-type': 'quorum', 'x-overflow': 'reject-publish', 'x-delivery-limit': DELIVERY_LIMIT }
  return { durable: true, arguments: 'x-dead-letter-exchange' in args ? { ...safe, 'x-dead-letter-strategy': 'at-least-once', ...args } : { ...safe, ...args } }
}

/**
 * The step for a wait: the next longer step if it is not much longer, otherwise the next shorter one. The steps are a second, halved and
 * doubled, which backoffs are made of, and seven steps between each two of these. They are 216 in all, and only those that are needed have queues.
 */
function stepFor (ms: number): number {
  if (ms <= SHORTEST_MS) return SHORTEST_MS
  if (ms >= LONGEST_MS) return LONGEST_MS
  const eighth = 125 * 2 ** Math.floor(Math.log2(ms / 1_000))
  const longer = Math.ceil(Math.ceil(ms / eighth) * eighth)
  return longer - ms <= TOLERANCE_MS ? longer : Math.floor(ms / eighth) * eighth
}
