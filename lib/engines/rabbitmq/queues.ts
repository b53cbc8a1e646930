/** The queues of the engine: one per definition, one more per definition for what has failed for good, and the queues where jobs wait. */
import type { Channel, ChannelModel, Options } from 'amqplib'
import type { FastifyBaseLogger } from 'fastify'
import { attempt } from '../../foreign.js'
import type { TaskSpec } from '../engine.js'
import { answered, onChannel } from './connection.js'

/**
 * The core counts the attempts, so the server never drops a job by itself, as RabbitMQ 4 does after 20 deliveries. The value for "never",
 * -1, is not accepted by RabbitMQ 3.10.
 */
const DELIVERY_LIMIT = 1_000_000_000
/** Channels on which queues are declared at the same time. A channel has one call under way. */
const LANES = 16
/** Most bytes of the name of a queue. */
const MAX_NAME = 255
/** Milliseconds that a wait may be too long, where that saves a second wait. */
const TOLERANCE_MS = 64
const SHORTEST_MS = 16
const LONGEST_MS = 1_000 * 2 ** 20 * 15 / 8

/** Messages that the server has not confirmed yet. */
export interface Flow {
  pending: number
  /** Ticks since the last confirm, or since `pending` was 0. */
  silentTicks: number
  /** The queue was declared again. RabbitMQ 3.10 may never confirm what a channel sends to it that has sent to the deleted one. */
  isRenewed: boolean
  /** How often the queue was declared again. */
  renewals: number
}

/** Where a message is published. */
export interface Address {
  readonly exchange: string
  readonly routingKey: string
  /** What is under way to the queue. Each queue has a leader of its own, which may fall silent alone. */
  readonly flow: Flow
}

export class RabbitMqQueues {
  readonly #prefix: string
  readonly #tasks: readonly TaskSpec[]
  readonly #log: FastifyBaseLogger
  /** The addresses of the queues of all definitions, by their names. */
  readonly #addresses: ReadonlyMap<string, Address>
  /** The queues for waiting that are declared, or are being declared, by the names of their exchanges. */
  readonly #waitQueues = new Map<string, Promise<unknown>>()
  /** What is under way to the queues for waiting, by the names of their exchanges. */
  readonly #waitFlows = new Map<string, Flow>()
  /** Queues that exist. A lost connection deletes none. */
  readonly #declared = new Set<string>()

  constructor (prefix: string, tasks: readonly TaskSpec[], log: FastifyBaseLogger) {
    this.#prefix = prefix
    this.#tasks = tasks
    this.#log = log
    const queues = tasks.flatMap(({ name }) => [this.queueOf(name), this.deadQueueOf(name)])
    this.#addresses = new Map(queues.map(routingKey => [routingKey, { exchange: '', routingKey, flow: newFlow() }]))
  }

  queueOf (task: string): string {
    return `${this.#prefix}.${task}`
  }

  /** The name of the queue for what has failed for good. */
  deadQueueOf (task: string): string {
    return `${this.queueOf(task)}.dead`
  }

  /** The name of the queue that exists while a process reads what has failed for good. It is no longer than that of the queue it stands for. */
  lockQueueOf (task: string): string {
    return `${this.#prefix}:lock:${task}`
  }

  addressOf (queue: string): Address {
    return this.#addresses.get(queue) as Address
  }

  /** What is under way, per queue. */
  * flows (): Iterable<Flow> {
    for (const { flow } of this.#addresses.values()) yield flow
    yield * this.#waitFlows.values()
  }

  /** Declares all queues that are not known to exist, several at the same time. */
  async declareAll (model: ChannelModel): Promise<void> {
    this.#waitQueues.clear()
    const names = new Set(this.#tasks.map(({ name }) => name))
    for (const { name } of this.#tasks) {
      if (names.has(`${name}.dead`)) throw new Error(`the task "${name}.dead" would run what "${name}" has failed at: rename one of them`)
      if (Buffer.byteLength(this.deadQueueOf(name)) > MAX_NAME) throw new Error(`the name of the task "${name}" is too long: RabbitMQ accepts ${MAX_NAME} bytes for prefix, name and ".dead"`)
    }
    const left = [...this.#addresses.keys()].filter(queue => !this.#declared.has(queue))
    const lane = async (): Promise<void> => {
      while (left.length > 0) {
        // The server closes the channel over a queue that exists with other settings: the rest goes on another one.
        await onChannel(model, async channel => {
          let queue: string | undefined
          do {
            queue = left.pop()
          } while (queue !== undefined && await this.#declareOn(channel, queue))
        })
      }
    }
    await Promise.all(Array.from({ length: Math.min(LANES, left.length) }, lane))
  }

  /** Declares the queue of a definition, or the queue of its failed jobs. A queue that exists with other settings is used as it is. */
  async declare (model: ChannelModel, queue: string): Promise<void> {
    if (this.#declared.has(queue)) return
    await onChannel(model, channel => this.#declareOn(channel, queue))
    const { flow } = this.addressOf(queue)
    flow.isRenewed = true
    flow.renewals++
  }

  /** Resolves to whether the channel is still open. */
  async #declareOn (channel: Channel, queue: string): Promise<boolean> {
    const spec = this.#tasks.find(({ name }) => this.queueOf(name) === queue)
    const route = spec === undefined ? {} : { 'x-dead-letter-exchange': '', 'x-dead-letter-routing-key': this.deadQueueOf(spec.name) }
    try {
      await answered(channel.assertQueue(queue, quorum(route)))
      this.#declared.add(queue)
      return true
    } catch (error) {
      if ((error as { code?: unknown }).code !== 406) throw error
      this.#declared.add(queue)
      attempt(() => { this.#log.warn(`background task engine "rabbitmq": the queue "${queue}" exists with other settings, and is used as it is. If it is no quorum queue, it counts no deliveries: a job whose process has died is then stored once more, with its count, before it starts again`) })
      return false
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
    let flow = this.#waitFlows.get(exchange)
    if (flow === undefined) this.#waitFlows.set(exchange, flow = newFlow())
    return { exchange, routingKey: queue, flow, ms: step }
  }

  /** Declares again what someone has deleted. */
  async repair (model: ChannelModel, { exchange, routingKey, flow }: Address): Promise<void> {
    this.forget(routingKey)
    if (exchange === '') {
      await this.declare(model, routingKey)
      return
    }
    const step = Number(exchange.slice(exchange.lastIndexOf(':') + 1))
    await onChannel(model, channel => declareWaitQueue(channel, exchange, step))
    flow.isRenewed = true
  }

  /** The queue may have been deleted: it is declared again when it is needed. */
  forget (queue: string): void {
    this.#declared.delete(queue)
  }

  /** A queue for waiting may have been deleted: each is declared again when it is needed. */
  forgetWaitQueues (): void {
    this.#waitQueues.clear()
  }
}

function newFlow (): Flow {
  return { pending: 0, silentTicks: 0, isRenewed: false, renewals: 0 }
}

/** A message keeps its routing key, which is the queue that it is for. So one exchange per step leads to the wait, and the default exchange back. */
async function declareWaitQueue (channel: Channel, name: string, step: number): Promise<void> {
  await answered(channel.assertExchange(name, 'fanout'))
  await answered(channel.assertQueue(name, quorum({ 'x-message-ttl': step, 'x-dead-letter-exchange': '' })))
  await answered(channel.bindQueue(name, name, ''))
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
