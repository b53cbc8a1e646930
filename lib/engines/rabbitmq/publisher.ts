/** The publishing side of the RabbitMQ engine. The server confirms each message, or publishing it rejects. */
import type { ChannelModel, ConfirmChannel, Options } from 'amqplib'
import { cork } from '../cork.js'
import { plainError } from '../plain-error.js'
import { socketOf, type RabbitMqConnection } from './connection.js'
import type { Address, RabbitMqQueues } from './queues.js'

export class RabbitMqPublisher {
  readonly #queues: RabbitMqQueues
  readonly #connection: () => RabbitMqConnection
  #channel: ConfirmChannel | undefined
  #blockedBy: string | undefined
  /** Messages that had no queue. The server returns them first, and then confirms them as if they were stored. */
  readonly #returned = new Set<string>()

  /** @param connection the connection whose `setUp` is this publisher's */
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
   * Resolves once the server has the message on disk. A queue that was deleted is declared again.
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

  /**
   * Publishes to the queue after so many milliseconds, or as near to that as one wait comes.
   * @param options called with the time when the message is due, if the wait is shorter than that
   */
  async publishLater (queue: string, delayMs: number, content: Buffer, options: (dueAt: number | undefined) => Options.Publish): Promise<void> {
    const dueAt = Date.now() + delayMs
    const { ms, ...address } = await this.#queues.addressAfter(this.#connection().model, queue, delayMs)
    await this.publish(address, content, options(ms < delayMs ? dueAt : undefined))
  }

  async #publishAgain (address: Address, content: Buffer, options: Options.Publish): Promise<void> {
    await this.#queues.repair(this.#connection().model, address)
    await new Promise<void>((resolve, reject) => {
      this.#send(address, content, options, (error, isStored) => {
        if (isStored) resolve()
        else reject(error ?? new Error(`RabbitMQ has no queue for ${JSON.stringify(address)}`))
      })
    })
  }

  /** @param done called with whether there was a queue for the message */
  #send ({ exchange, routingKey }: Address, content: Buffer, options: Options.Publish, done: (error: Error | undefined, isStored: boolean) => void): void {
    // A message that is written now would be stored when the alarm is over, although its request was answered with a 503.
    if (this.#blockedBy !== undefined) throw new Error(`RabbitMQ has blocked publishers: ${this.#blockedBy}`)
    const channel = this.#openedChannel()
    channel.publish(exchange, routingKey, content, options, (error: unknown) => {
      if (error !== null) done(plainError(error), false)
      else done(undefined, this.#returned.size === 0 || !this.#returned.delete(returnedKey(routingKey, options.messageId)))
    })
    cork(socketOf(channel))
  }

  #openedChannel (): ConfirmChannel {
    if (this.#channel !== undefined) return this.#channel
    // Without a connection this throws an error that says why.
    void this.#connection().model
    throw new Error('RabbitMQ has closed the channel: it is opened again')
  }

  async #openChannel (model: ChannelModel): Promise<void> {
    const channel = await model.createConfirmChannel()
    // Each message that was under way on the channel fails by itself.
    channel.on('error', () => {})
    channel.on('return', ({ fields, properties }) => { this.#returned.add(returnedKey(fields.routingKey, properties.messageId)) })
    channel.once('close', () => {
      if (this.#channel !== channel) return
      this.#channel = undefined
      this.#returned.clear()
      // Publishing to an exchange that someone has deleted closes the channel.
      this.#queues.forgetWaitQueues()
      // If this fails, the channel is opened with the next connection.
      this.#openChannel(model).catch(() => { this.#connection().replace('its channel could not be opened again') })
    })
    this.#channel = channel
  }
}

function returnedKey (routingKey: string, messageId: unknown): string {
  return `${String(messageId)} ${routingKey}`
}
