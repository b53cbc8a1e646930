/** The consuming side of the RabbitMQ engine: one consumer per definition. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Channel, ChannelModel, ConsumeMessage } from 'amqplib'
import { attempt } from '../../foreign.js'
import { cork } from '../cork.js'
import type { Delivery, TaskSpec, Verdict } from '../engine.js'
import { plain, quietly, socketOf } from './connection.js'
import { copyOf, dueAtOf, failedCopyOf, toDelivery } from './messages.js'
import type { RabbitMqPublisher } from './publisher.js'
import type { RabbitMqQueues } from './queues.js'

/** Milliseconds after which is tried again what the server did not take. */
const RECOVERY_MS = 500
/** Each consumer has a channel of its own, so one name will do. */
const TAG = 'worker'
/** Of the protocol. */
const MAX_PREFETCH = 65_535

/** A job that runs here, and the messages that it has come in: a lost connection brings it once more. */
interface Held {
  readonly delivery: Delivery
  readonly message: ConsumeMessage
  readonly received: Array<{ readonly channel: Channel, readonly message: ConsumeMessage }>
}

export interface RabbitMqConsumerOptions {
  readonly spec: TaskSpec
  readonly queues: RabbitMqQueues
  readonly publisher: RabbitMqPublisher
  readonly run: (delivery: Delivery) => Promise<Verdict>
  readonly onError: (error: Error) => void
}

export class RabbitMqConsumer {
  readonly #options: RabbitMqConsumerOptions
  readonly #queue: string
  readonly #held = new Map<string, Held>()
  /** The connection of now. */
  #model: ChannelModel | undefined
  /** The one that is subscribed, or about to be. */
  #channel: Channel | undefined
  /** That one, and those before it for as long as jobs run that came in there. */
  readonly #open = new Set<Channel>()
  #isPaused = false
  #isMending = false
  #received = 0
  #receivedBefore = 0
  #onIdle: (() => void) | undefined

  constructor (options: RabbitMqConsumerOptions) {
    this.#options = options
    this.#queue = options.queues.queueOf(options.spec.name)
  }

  /** For each new connection. */
  async setUp (model: ChannelModel): Promise<void> {
    this.#model = model
    if (!this.#isPaused) await this.#subscribe(model)
  }

  /**
   * Subscribes anew if there is room, and nothing has come for a while. RabbitMQ 3.10 does not tell the consumer of a quorum
   * queue that was deleted and declared again at once: jobs are handed to it, and get lost on the way until its channel
   * closes. The server's counts of messages and consumers look well then.
   */
  async look (): Promise<void> {
    const [model, channel, received] = [this.#model, this.#channel, this.#received]
    const isQuiet = received === this.#receivedBefore && this.#held.size < this.#options.spec.concurrency
    this.#receivedBefore = received
    if (isQuiet && model !== undefined && channel !== undefined && !this.#isPaused) await this.#subscribe(model)
  }

  /** Takes no further jobs. Those on their way go back. */
  async pause (): Promise<void> {
    this.#isPaused = true
    const channel = this.#channel
    if (channel !== undefined) await quietly(() => channel.cancel(TAG))
  }

  /** Resolves when nothing runs and the server knows every verdict. */
  async idle (): Promise<void> {
    while (this.#held.size > 0) await new Promise<void>(resolve => { this.#onIdle = resolve })
    await Promise.all(Array.from(this.#open, channel => quietly(() => channel.close())))
  }

  /** On a channel of its own each time, for that reason. */
  async #subscribe (model: ChannelModel): Promise<void> {
    const { spec, queues } = this.#options
    await queues.declare(model, this.#queue)
    const channel = await model.createChannel()
    let reason: unknown
    channel.on('error', error => { reason = error })
    channel.once('close', () => {
      this.#open.delete(channel)
      if (this.#channel !== channel) return
      this.#channel = undefined
      // Without a reason it closes with its connection, and there is another one with the next.
      if (reason !== undefined) void this.#mend(reason)
    })
    await channel.prefetch(Math.min(spec.concurrency, MAX_PREFETCH))
    this.#open.add(channel)
    const former = this.#channel
    this.#channel = channel
    await channel.consume(this.#queue, message => {
      if (message === null) this.#cancelled(channel)
      else this.#receive(channel, message)
    }, { consumerTag: TAG })
    if (former !== undefined) {
      await quietly(() => former.cancel(TAG))
      this.#letGo(former)
    }
  }

  /** By the server: the queue was deleted, or has moved. */
  #cancelled (channel: Channel): void {
    if (this.#channel !== channel) return
    this.#channel = undefined
    this.#letGo(channel)
    void this.#mend(new Error(`RabbitMQ has cancelled the consumer of "${this.#queue}"`))
  }

  async #mend (reason: unknown): Promise<void> {
    if (this.#isPaused) return
    this.#options.onError(plain(reason))
    if (this.#isMending) return
    this.#isMending = true
    while (this.#channel === undefined && this.#model !== undefined && !this.#isPaused) {
      try {
        await this.#subscribe(this.#model)
      } catch (error) {
        this.#options.onError(plain(error))
        await sleep(RECOVERY_MS, undefined, { ref: false })
      }
    }
    this.#isMending = false
  }

  #receive (channel: Channel, message: ConsumeMessage): void {
    this.#received++
    const delivery = toDelivery(this.#options.spec.name, message)
    const running = this.#held.get(delivery.id)
    if (running !== undefined) {
      running.received.push({ channel, message })
      return
    }
    const held: Held = { delivery, message, received: [{ channel, message }] }
    this.#held.set(delivery.id, held)
    const dueAt = dueAtOf(message)
    if (this.#isPaused) void this.#settle(held, { kind: 'released' })
    else if (dueAt !== undefined && dueAt > Date.now()) void this.#carryOut(held, () => this.#waitAgain(held, dueAt))
    else void this.#options.run(delivery).then(verdict => this.#settle(held, verdict))
  }

  async #settle (held: Held, verdict: Verdict): Promise<void> {
    if (verdict.kind === 'done') this.#end(held)
    else await this.#carryOut(held, () => this.#publish(held, verdict))
  }

  /** What is published stands for the message, which is acknowledged behind it: a death in between leaves both, never none. */
  async #carryOut (held: Held, publish: () => Promise<void>): Promise<void> {
    // Of a connection that is lost the server takes no word, and delivers again what it had delivered there.
    while (held.received.some(({ channel }) => this.#open.has(channel))) {
      try {
        await publish()
        break
      } catch (error) {
        this.#options.onError(plain(error))
        await sleep(RECOVERY_MS)
      }
    }
    this.#end(held)
  }

  async #publish (held: Held, verdict: Exclude<Verdict, { kind: 'done' }>): Promise<void> {
    const { publisher, queues, spec } = this.#options
    const { message, delivery: { id, attempt: starts } } = held
    switch (verdict.kind) {
      case 'released':
        return await publisher.publish({ exchange: '', routingKey: this.#queue }, message.content, copyOf(message, { id, attempts: starts - 1 }))
      case 'retry':
        if (verdict.delayMs <= 0) return await publisher.publish({ exchange: '', routingKey: this.#queue }, message.content, copyOf(message, { id, attempts: starts }))
        return await publisher.publishLater(this.#queue, verdict.delayMs, message.content, dueAt => copyOf(message, { id, attempts: starts, dueAt }))
      case 'failed': {
        const keepMs = Math.min(Math.ceil(spec.keep.failed * 1000), 2 ** 32 - 1)
        if (keepMs === 0) return
        await publisher.publish({ exchange: '', routingKey: queues.deadQueueOf(spec.name) }, message.content, failedCopyOf(message, { id, attempt: starts, error: verdict.error, keepMs }))
      }
    }
  }

  async #waitAgain ({ message, delivery: { id, attempt: starts } }: Held, dueAt: number): Promise<void> {
    const delayMs = Math.max(dueAt - Date.now(), 1)
    await this.#options.publisher.publishLater(this.#queue, delayMs, message.content, due => copyOf(message, { id, attempts: starts - 1, dueAt: due }))
  }

  #end (held: Held): void {
    this.#held.delete(held.delivery.id)
    for (const { channel, message } of held.received) {
      if (!this.#open.has(channel)) continue
      // It may be about to close.
      attempt(() => {
        channel.ack(message)
        cork(socketOf(channel))
      })
      if (channel !== this.#channel) this.#letGo(channel)
    }
    if (this.#held.size === 0) this.#onIdle?.()
  }

  /** Closes a channel that is not subscribed any more, once nothing runs that came in there. */
  #letGo (channel: Channel): void {
    for (const { received } of this.#held.values()) {
      if (received.some(message => message.channel === channel)) return
    }
    void quietly(() => channel.close())
  }
}
