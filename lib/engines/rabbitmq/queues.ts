/** The queues of the engine: one per definition, one beside it for what has failed, and those where jobs wait. */
import type { Channel, ChannelModel, Options } from 'amqplib'
import type { FastifyBaseLogger } from 'fastify'
import type { TaskSpec } from '../engine.js'
import { onChannel } from './connection.js'

/**
 * Attempts are the core's to count: the server is never to give a job up by itself, as RabbitMQ 4 does after 20 deliveries.
 * It has a word for "never", -1, which 3.10 does not take.
 */
const DELIVERY_LIMIT = 1_000_000_000
/** Milliseconds that a wait may be too long, so that it needs no second one. */
const TOLERANCE_MS = 64
const SHORTEST_MS = 16
const LONGEST_MS = 1_000 * 2 ** 20 * 15 / 8

/** Where a message is published to. */
export interface Address {
  readonly exchange: string
  readonly routingKey: string
}

export class RabbitMqQueues {
  readonly #prefix: string
  readonly #tasks: readonly TaskSpec[]
  readonly #log: FastifyBaseLogger
  /** Steps of waiting that are declared, or are about to be, each by its exchange. */
  readonly #waits = new Map<string, Promise<unknown>>()
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

  /** The queue of what has failed for good. */
  deadQueueOf (task: string): string {
    return `${this.queueOf(task)}.dead`
  }

  async declareAll (model: ChannelModel): Promise<void> {
    this.#waits.clear()
    const names = new Set(this.#tasks.map(({ name }) => name))
    const taken = this.#tasks.find(({ name }) => names.has(`${name}.dead`))
    if (taken !== undefined) throw new Error(`the task "${taken.name}.dead" would run what "${taken.name}" has failed at: rename one of them`)
    for (const { name } of this.#tasks) {
      await this.declare(model, this.deadQueueOf(name))
      await this.declare(model, this.queueOf(name))
    }
  }

  /** Declares a queue of a definition, or the one of its failed jobs. One that exists with other settings is taken as it is. */
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
   * The way to a queue for a message that has to wait before. One queue for each step of waiting, shared by all definitions:
   * in a queue all wait equally long, so none is behind another. Of steps there are eight to each doubling, so a wait that
   * is none of them takes the longest that fits, comes to the queue too early, and waits again for the rest.
   * @returns the milliseconds that it will wait there, too
   */
  async wait (model: ChannelModel, queue: string, ms: number): Promise<Address & { readonly ms: number }> {
    const step = stepFor(ms)
    const exchange = `${this.#prefix}:wait:${step}`
    let declaring = this.#waits.get(exchange)
    if (declaring === undefined) {
      declaring = onChannel(model, channel => declareWait(channel, exchange, step))
      this.#waits.set(exchange, declaring)
      declaring.catch(() => { this.#waits.delete(exchange) })
    }
    await declaring
    return { exchange, routingKey: queue, ms: step }
  }

  /** Someone has deleted it. */
  async repair (model: ChannelModel, { exchange, routingKey }: Address): Promise<void> {
    this.#foreign.delete(routingKey)
    if (exchange === '') {
      await this.declare(model, routingKey)
      return
    }
    const step = Number(exchange.slice(exchange.lastIndexOf(':') + 1))
    await onChannel(model, channel => declareWait(channel, exchange, step))
  }

  /** Whatever was deleted is declared again when it is needed. */
  forgetWaits (): void {
    this.#waits.clear()
  }
}

/** The message keeps its routing key, the queue that it is for: so one exchange per step finds the way there, and the default one back. */
async function declareWait (channel: Channel, name: string, step: number): Promise<void> {
  await channel.assertExchange(name, 'fanout')
  await channel.assertQueue(name, quorum({ 'x-message-ttl': step, 'x-dead-letter-exchange': '' }))
  await channel.bindQueue(name, name, '')
}

/** At least once: a message leaves one queue when the next one has it. The server does that only for queues that refuse when they are full. */
function quorum (args: Record<string, string | number>): Options.AssertQueue {
  const safe = { 'x-queue-type': 'quorum', 'x-overflow': 'reject-publish', 'x-delivery-limit': DELIVERY_LIMIT }
  return { durable: true, arguments: 'x-dead-letter-exchange' in args ? { ...safe, 'x-dead-letter-strategy': 'at-least-once', ...args } : { ...safe, ...args } }
}

/**
 * A second, halved and doubled, and seven steps between each two of these: what backoffs are made of, 216 in all, of which
 * those are declared that are needed. The next longer one if it is not much longer, else the next shorter one.
 */
function stepFor (ms: number): number {
  if (ms <= SHORTEST_MS) return SHORTEST_MS
  if (ms >= LONGEST_MS) return LONGEST_MS
  const eighth = 125 * 2 ** Math.floor(Math.log2(ms / 1_000))
  const longer = Math.ceil(Math.ceil(ms / eighth) * eighth)
  return longer - ms <= TOLERANCE_MS ? longer : Math.floor(ms / eighth) * eighth
}
