/** The publishing side of the RabbitMQ engine: each message is confirmed by the server, or an error. */
import type { ChannelModel, ConfirmChannel, Options } from 'amqplib'
import { cork } from '../cork.js'
import { destroy, plain, socketOf, type RabbitMqConnection } from './connection.js'
import type { Address, RabbitMqQueues } from './queues.js'

export class RabbitMqPublisher {
  readonly #queues: RabbitMqQueues
  readonly #connection: () => RabbitMqConnection
  #channel: ConfirmChannel | undefined
  #blockedBy: string | undefined
  /** Messages that had no queue. Their confirms, which follow, do not tell. */
  readonly #returned = new Set<string>()

  /** @param connection the one whose `setUp` is this publisher's */
  constructor (queues: RabbitMqQueues, connection: () => RabbitMqConnection) {
    this.#queues = queues
    this.#connection = connection
  }

  async setUp (model: ChannelModel): Promise<void> {
    this.#blockedBy = undefined
    model.on('blocked', reason => { this.#blockedBy = reason })
    model.on('unblocked', () => { this.#blockedBy = undefined })
    await this.#queues.declareAll(model)
    await this.#openChannel(model)
  }

  /**
   * Resolves once the server has it on disk. A queue that was deleted is declared again.
   * @param options with `mandatory` and a `messageId`
   */
  publish (address: Address, content: Buffer, options: Options.Publish): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#send(address, content, options, (error, isStored) => {
        if (error !== undefined) reject(error)
        else if (isStored) resolve()
        else this.#publishAgain(address, content, options).then(resolve, reject)
      })
    })
  }

  /** Publishes to the queue in so many milliseconds, as near as one wait comes to it. */
  async publishLater (queue: string, delayMs: number, content: Buffer, options: (dueAt: number | undefined) => Options.Publish): Promise<void> {
    const dueAt = Date.now() + delayMs
    const { ms, ...address } = await this.#queues.wait(this.#connection().opened(), queue, delayMs)
    await this.publish(address, content, options(ms < delayMs ? dueAt : undefined))
  }

  async #publishAgain (address: Address, content: Buffer, options: Options.Publish): Promise<void> {
    await this.#queues.repair(this.#connection().opened(), address)
    await new Promise<void>((resolve, reject) => {
      this.#send(address, content, options, (error, isStored) => {
        if (isStored) resolve()
        else reject(error ?? new Error(`RabbitMQ has no queue for ${JSON.stringify(address)}`))
      })
    })
  }

  /** @param done told whether there was a queue for it */
  #send ({ exchange, routingKey }: Address, content: Buffer, options: Options.Publish, done: (error: Error | undefined, isStored: boolean) => void): void {
    // What is written now would be stored when the alarm is over, whatever was answered meanwhile.
    if (this.#blockedBy !== undefined) throw new Error(`RabbitMQ has blocked publishers: ${this.#blockedBy}`)
    const channel = this.#opened()
    channel.publish(exchange, routingKey, content, options, (error: unknown) => {
      if (error !== null) done(plain(error), false)
      else done(undefined, this.#returned.size === 0 || !this.#returned.delete(markOf(routingKey, options.messageId)))
    })
    cork(socketOf(channel))
  }

  #opened (): ConfirmChannel {
    if (this.#channel !== undefined) return this.#channel
    this.#connection().opened()
    throw new Error('RabbitMQ has closed the channel: it is opened again')
  }

  async #openChannel (model: ChannelModel): Promise<void> {
    const channel = await model.createConfirmChannel()
    // Each message that was under way on it fails.
    channel.on('error', () => {})
    channel.on('return', ({ fields, properties }) => { this.#returned.add(markOf(fields.routingKey, properties.messageId)) })
    channel.once('close', () => {
      if (this.#channel !== channel) return
      this.#channel = undefined
      this.#returned.clear()
      // An exchange that someone has deleted closes it.
      this.#queues.forgetWaits()
      // With its connection it is opened anew, if not before.
      this.#openChannel(model).catch(() => { destroy(model) })
    })
    this.#channel = channel
  }
}

function markOf (routingKey: string, messageId: unknown): string {
  return `${String(messageId)} ${routingKey}`
}
