/** The consuming side of the RabbitMQ engine: one consumer per definition. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Channel, ChannelModel, ConsumeMessage } from 'amqplib'
import { cork } from '../cork.js'
import type { Delivery, TaskSpec, Verdict } from '../engine.js'
import { plainError } from '../plain-error.js'
import { quietly, socketOf } from './connection.js'
import { copyOf, dueAtOf, failedCopyOf, toDelivery } from './messages.js'
import type { RabbitMqPublisher } from './publisher.js'
import type { RabbitMqQueues } from './queues.js'

/** Milliseconds until something that the server did not accept is tried again. */
const RECOVERY_MS = 500
/** Each consumer has a channel of its own, so all consumers can have one name. */
const TAG = 'worker'
/** The protocol has no larger number. */
const MAX_PREFETCH = 65_535

/** A job that this process has. A lost connection brings its message once more. */
interface TakenJob {
  readonly delivery: Delivery
  readonly message: ConsumeMessage
  /** All messages in which the job has come, with the channels on which they came. */
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
  readonly #jobs = new Map<string, TakenJob>()
  /** The current connection. */
  #model: ChannelModel | undefined
  /** The channel that is subscribed, or about to be. */
  #channel: Channel | undefined
  /** The channel that is subscribed, and earlier ones for as long as jobs run that came on them. */
  readonly #openChannels = new Set<Channel>()
  #isPaused = false
  #isResubscribing = false
  /** Messages received, now and when the consumer was last checked for being quiet. */
  #received = 0
  #receivedBefore = 0
  #onIdle: (() => void) | undefined

  constructor (options: RabbitMqConsumerOptions) {
    this.#options = options
    this.#queue = options.queues.queueOf(options.spec.name)
  }

  /** Subscribes on a new connection. */
  async setUp (model: ChannelModel): Promise<void> {
    this.#model = model
    if (!this.#isPaused) await this.#subscribe(model)
  }

  /**
   * Subscribes anew if there is room for jobs, and nothing has come since the last call. RabbitMQ 3.10 does not tell the consumer of a quorum
   * queue that the queue was deleted and immediately declared again. The jobs that are handed to this consumer are then lost on the way until
   * its channel closes, and the server's counts of messages and consumers look right.
   */
  async resubscribeIfQuiet (): Promise<void> {
    const [model, channel, received] = [this.#model, this.#channel, this.#received]
    const isQuiet = received === this.#receivedBefore && this.#jobs.size < this.#options.spec.concurrency
    this.#receivedBefore = received
    if (isQuiet && model !== undefined && channel !== undefined && !this.#isPaused) await this.#subscribe(model)
  }

  /** Takes no further jobs. Jobs that are on their way are returned to their queue. */
  async pause (): Promise<void> {
    this.#isPaused = true
    const channel = this.#channel
    if (channel !== undefined) await quietly(() => channel.cancel(TAG))
  }

  /** Resolves when nothing runs and the server knows every verdict. */
  async idle (): Promise<void> {
    while (this.#jobs.size > 0) await new Promise<void>(resolve => { this.#onIdle = resolve })
    await Promise.all(Array.from(this.#openChannels, channel => quietly(() => channel.close())))
  }

  /** Subscribes on a new channel each time, because the old one may be the one that RabbitMQ 3.10 does not serve any more. */
  async #subscribe (model: ChannelModel): Promise<void> {
    const { spec, queues } = this.#options
    await queues.declare(model, this.#queue)
    const channel = await model.createChannel()
    let reason: unknown
    channel.on('error', error => { reason = error })
    channel.once('close', () => {
      this.#openChannels.delete(channel)
      if (this.#channel !== channel) return
      this.#channel = undefined
      // A channel that closes without a reason closes with its connection, and the next connection brings another channel.
      if (reason !== undefined) void this.#resubscribe(reason)
    })
    await channel.prefetch(Math.min(spec.concurrency, MAX_PREFETCH))
    this.#openChannels.add(channel)
    const former = this.#channel
    this.#channel = channel
    await channel.consume(this.#queue, message => {
      if (message === null) this.#onCancelled(channel)
      else this.#receive(channel, message)
    }, { consumerTag: TAG })
    if (former !== undefined) {
      await quietly(() => former.cancel(TAG))
      this.#closeUnlessUsed(former)
    }
  }

  /** The server has cancelled the consumer, because the queue was deleted or has moved. */
  #onCancelled (channel: Channel): void {
    if (this.#channel !== channel) return
    this.#channel = undefined
    this.#closeUnlessUsed(channel)
    void this.#resubscribe(new Error(`RabbitMQ has cancelled the consumer of "${this.#queue}"`))
  }

  async #resubscribe (reason: unknown): Promise<void> {
    if (this.#isPaused) return
    this.#options.onError(plainError(reason))
    if (this.#isResubscribing) return
    this.#isResubscribing = true
    while (this.#channel === undefined && this.#model !== undefined && !this.#isPaused) {
      try {
        await this.#subscribe(this.#model)
      } catch (error) {
        this.#options.onError(plainError(error))
        await sleep(RECOVERY_MS, undefined, { ref: false })
      }
    }
    this.#isResubscribing = false
  }

  #receive (channel: Channel, message: ConsumeMessage): void {
    this.#received++
    const delivery = toDelivery(this.#options.spec.name, message)
    const running = this.#jobs.get(delivery.id)
    if (running !== undefined) {
      running.received.push({ channel, message })
      return
    }
    const job: TakenJob = { delivery, message, received: [{ channel, message }] }
    this.#jobs.set(delivery.id, job)
    const dueAt = dueAtOf(message)
    if (this.#isPaused) void this.#settle(job, { kind: 'released' })
    else if (dueAt !== undefined && dueAt > Date.now()) void this.#replace(job, () => this.#waitAgain(job, dueAt))
    else void this.#options.run(delivery).then(verdict => this.#settle(job, verdict))
  }

  async #settle (job: TakenJob, verdict: Verdict): Promise<void> {
    if (verdict.kind === 'done') this.#end(job)
    else await this.#replace(job, () => this.#publish(job, verdict))
  }

  /** Publishes what takes the place of a message, and acknowledges the message after that. If the process dies in between, both are there, and never none. */
  async #replace (job: TakenJob, publish: () => Promise<void>): Promise<void> {
    // After a connection is lost, the server accepts no acknowledgement for it, and delivers its messages again.
    while (job.received.some(({ channel }) => this.#openChannels.has(channel))) {
      try {
        await publish()
        break
      } catch (error) {
        this.#options.onError(plainError(error))
        await sleep(RECOVERY_MS)
      }
    }
    this.#end(job)
  }

  async #publish (job: TakenJob, verdict: Exclude<Verdict, { kind: 'done' }>): Promise<void> {
    const { publisher, queues, spec } = this.#options
    const { message, delivery: { id, attempt } } = job
    const publishAgain = (attempts: number): Promise<void> =>
      publisher.publish({ exchange: '', routingKey: this.#queue }, message.content, copyOf(message, { id, attempts }))
    switch (verdict.kind) {
      case 'released':
        return await publishAgain(attempt - 1)
      case 'retry':
        if (verdict.delayMs <= 0) return await publishAgain(attempt)
        return await publisher.publishLater(this.#queue, verdict.delayMs, message.content, dueAt => copyOf(message, { id, attempts: attempt, dueAt }))
      case 'failed': {
        const keepMs = Math.min(Math.ceil(spec.keep.failed * 1000), 2 ** 32 - 1)
        if (keepMs === 0) return
        await publisher.publish({ exchange: '', routingKey: queues.deadQueueOf(spec.name) }, message.content, failedCopyOf(message, { id, attempt, error: verdict.error, keepMs }))
      }
    }
  }

  async #waitAgain ({ message, delivery: { id, attempt } }: TakenJob, dueAt: number): Promise<void> {
    const delayMs = Math.max(dueAt - Date.now(), 1)
    await this.#options.publisher.publishLater(this.#queue, delayMs, message.content, due => copyOf(message, { id, attempts: attempt - 1, dueAt: due }))
  }

  #end (job: TakenJob): void {
    this.#jobs.delete(job.delivery.id)
    for (const { channel, message } of job.received) {
      if (!this.#openChannels.has(channel)) continue
      try {
        channel.ack(message)
        cork(socketOf(channel))
      } catch {
        // The channel is about to close, and the server will deliver the message again.
      }
      if (channel !== this.#channel) this.#closeUnlessUsed(channel)
    }
    if (this.#jobs.size === 0) this.#onIdle?.()
  }

  /** Closes a channel that is not subscribed any more, unless jobs run that came on it. */
  #closeUnlessUsed (channel: Channel): void {
    for (const { received } of this.#jobs.values()) {
      if (received.some(message => message.channel === channel)) return
    }
    void quietly(() => channel.close())
  }
}
