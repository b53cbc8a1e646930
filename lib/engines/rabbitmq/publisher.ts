/** The publishing side of the RabbitMQ engine. The server confirms each message, or publishing it rejects. */
import { IllegalOperationError, type ChannelModel, type ConfirmChannel, type Options } from 'amqplib'
import type { FastifyBaseLogger } from 'fastify'
import { attempt } from '../../foreign.js'
import { cork } from '../cork.js'
import { headersOf } from '../stored-task.js'
import { plainError } from '../plain-error.js'
import { answered, quietly, socketOf, type RabbitMqConnection } from './connection.js'
import { fitted, roomOf } from './headers.js'
import type { Address, RabbitMqQueues } from './queues.js'

/** Bytes above which a message has a channel for itself while it is under way: the server closes the channel over one that is too large. */
const LARGE = 65_536
/** Channels that are kept for large messages. */
const MAX_SPARE = 4
/** Bytes of a message that no server accepts. */
const MOST_BYTES = 536_870_912
/** Ticks, of half a second, without a confirm after which a connection is given up. */
const SILENT_TICKS = 30
/** The same for a queue that was deleted and declared again. */
const RENEWED_TICKS = 2
/** Fewest ticks between two channels that take the place of one on which a message was refused. */
const REFUSED_TICKS = 4
/** Milliseconds that a channel which was replaced has for its confirms. */
const FORMER_MS = 10_000

/** The server never accepts a message of this size. */
export class TooLargeError extends Error {}

export class RabbitMqPublisher {
  readonly #queues: RabbitMqQueues
  readonly #connection: () => RabbitMqConnection
  readonly #log: FastifyBaseLogger
  #channel: ConfirmChannel | undefined
  #spare: ConfirmChannel[] = []
  #blockedBy: string | undefined
  #room = 0
  /** The last channel on which the server has refused a message. */
  #refusing: ConfirmChannel | undefined
  /** Ticks since a channel was last replaced over that. */
  #channelTicks = 0
  /** The most bytes of a message, as far as it is known. */
  #maxBytes = MOST_BYTES
  #hasLeftOut = false
  /** Messages that had no queue. The server returns them first, and then confirms them as if they were stored. */
  readonly #returned = new Map<string, number>()
  /** Why the server has closed a channel. */
  readonly #refusals = new WeakMap<ConfirmChannel, Error>()

  /** @param connection the connection whose `setUp` is this publisher's */
  constructor (queues: RabbitMqQueues, connection: () => RabbitMqConnection, log: FastifyBaseLogger) {
    this.#queues = queues
    this.#connection = connection
    this.#log = log
  }

  /** The most bytes of headers. */
  get room (): number {
    return this.#room
  }

  async setUp (model: ChannelModel): Promise<void> {
    this.#blockedBy = undefined
    model.on('blocked', reason => { this.#blockedBy = reason })
    model.on('unblocked', () => { this.#blockedBy = undefined })
    this.#room = roomOf(model)
    this.#spare = []
    await this.#queues.declareAll(model)
    this.#channel = await this.#openChannel(model)
  }

  /** To be called each half second. The leader of a queue can fall silent while the connection to another node is alive: a new connection finds the new leader. */
  tick (): void {
    if (++this.#channelTicks >= REFUSED_TICKS && this.#channel !== undefined && this.#channel === this.#refusing) void this.#renewChannel(this.#channel)
    for (const flow of this.#queues.flows()) {
      if (flow.pending === 0) flow.isRenewed = false
      if (flow.pending === 0 || this.#blockedBy !== undefined) flow.silentTicks = 0
      else if (++flow.silentTicks > (flow.isRenewed ? RENEWED_TICKS : SILENT_TICKS)) {
        const because = flow.isRenewed ? 'the server does not confirm what goes to a queue that was deleted and declared again' : 'the server has confirmed nothing for 15 s'
        flow.silentTicks = 0
        flow.isRenewed = false
        const connection = this.#connection()
        if (connection.isOpen) connection.replace(connection.model, because)
      }
    }
  }

  /**
   * Resolves once the server has the message on disk. A queue that was deleted is declared again.
   * @param options with `mandatory` and a `messageId`
   * @throws TooLargeError
   */
  publish (address: Address, content: Buffer, options: Options.Publish): Promise<void> {
    if (content.length > LARGE) return this.#publishLarge(address, content, options)
    return new Promise((resolve, reject) => {
      this.#send(this.#openedChannel(), address, content, options, (error, isStored) => {
        if (error !== undefined) reject(error)
        else if (isStored) resolve()
        else this.#publishAgain(address, content, options).then(resolve, reject)
      })
    })
  }

  /**
   * Publishes to the queue after so many milliseconds, or as near to that as one wait comes.
   * @param options called with the wait that is left then
   */
  async publishLater (queue: string, delayMs: number, content: Buffer, options: (waitMs: number) => Options.Publish): Promise<void> {
    const { ms, ...address } = await this.#queues.addressAfter(this.#connection().model, queue, delayMs)
    await this.publish(address, content, options(Math.max(Math.ceil(delayMs - ms), 0)))
  }

  async #publishLarge (address: Address, content: Buffer, options: Options.Publish): Promise<void> {
    this.#checkSize(content)
    const { model } = this.#connection()
    const channel = this.#spare.pop() ?? await answered(this.#openLargeChannel(model))
    let isUsable = false
    try {
      if (!await this.#sendOn(channel, address, content, options)) {
        await this.#queues.repair(model, address)
        if (!await this.#sendOn(channel, address, content, options)) throw nowhere(address)
      }
      isUsable = this.#spare.length < MAX_SPARE && this.#connection().model === model
    } finally {
      if (isUsable) this.#spare.push(channel)
      else void quietly(() => channel.close())
    }
  }

  async #publishAgain (address: Address, content: Buffer, options: Options.Publish): Promise<void> {
    await this.#queues.repair(this.#connection().model, address)
    if (!await this.#sendOn(this.#openedChannel(), address, content, options)) throw nowhere(address)
  }

  /** Resolves to whether there was a queue for the message. */
  #sendOn (channel: ConfirmChannel, address: Address, content: Buffer, options: Options.Publish): Promise<boolean> {
    return new Promise((resolve, reject) => {
      this.#send(channel, address, content, options, (error, isStored) => {
        if (error === undefined) resolve(isStored)
        else reject(error)
      })
    })
  }

  /** @param done called with whether there was a queue for the message */
  #send (channel: ConfirmChannel, { exchange, routingKey, flow }: Address, content: Buffer, options: Options.Publish, done: (error: Error | undefined, isStored: boolean) => void): void {
    // A message that is written now would be stored when the alarm is over, although its request was answered with a 503.
    if (this.#blockedBy !== undefined) throw new Error(`RabbitMQ has blocked publishers: ${this.#blockedBy}`)
    this.#checkSize(content)
    const headers = options.headers as Record<string, unknown> | undefined
    const fitting = headers === undefined ? undefined : fitted(headers, this.#room, name => { this.#leaveOut(name) })
    const confirmed = (error: unknown): void => {
      flow.pending--
      flow.silentTicks = 0
      if (error === null) done(undefined, this.#returned.size === 0 || !this.#wasReturned(returnedKey(routingKey, options.messageId)))
      else {
        this.#refusing = channel
        done(this.#refusalOf(channel, content) ?? plainError(error), false)
      }
    }
    const write = (headers: unknown): boolean => channel.publish(exchange, routingKey, content, headers === options.headers ? options : { ...options, headers }, confirmed)
    try {
      write(fitting)
    } catch (error) {
      if (error instanceof IllegalOperationError) throw error
      // Another client may have sent headers that amqplib does not encode. Nothing was written.
      write(headersOf(fitting))
    }
    if (flow.pending++ === 0) flow.silentTicks = 0
    cork(socketOf(channel))
  }

  /** Other programs may give several messages the same id. */
  #wasReturned (key: string): boolean {
    const count = this.#returned.get(key) ?? 0
    if (count > 1) this.#returned.set(key, count - 1)
    else this.#returned.delete(key)
    return count > 0
  }

  #checkSize (content: Buffer): void {
    if (content.length > this.#maxBytes) throw new TooLargeError(`has ${content.length} bytes as JSON, and RabbitMQ accepts ${this.#maxBytes}`)
  }

  #leaveOut (name: string): void {
    if (this.#hasLeftOut) return
    this.#hasLeftOut = true
    attempt(() => { this.#log.warn(`background task engine "rabbitmq": the header "${name.slice(0, 100)}" of a job was left out, because the headers have more bytes than RabbitMQ accepts here (${this.#room}). Further ones are left out without a warning`) })
  }

  #refusalOf (channel: ConfirmChannel, content: Buffer): Error | undefined {
    const refusal = this.#refusals.get(channel)
    if (refusal === undefined) return undefined
    // The server tells its limit only when it is exceeded.
    const limit = Number(/larger than (?:the )?configured max size (\d+)/.exec(refusal.message)?.[1])
    if (limit > 0) this.#maxBytes = Math.min(this.#maxBytes, limit)
    try {
      this.#checkSize(content)
    } catch (error) {
      return error as Error
    }
    return plainError(refusal)
  }

  #openedChannel (): ConfirmChannel {
    if (this.#channel !== undefined) return this.#channel
    // Without a connection this throws an error that says why.
    void this.#connection().model
    throw new Error('RabbitMQ has closed the channel: it is opened again')
  }

  async #openLargeChannel (model: ChannelModel): Promise<ConfirmChannel> {
    const channel = await this.#newChannel(model)
    channel.once('close', () => { this.#spare = this.#spare.filter(spare => spare !== channel) })
    return channel
  }

  async #openChannel (model: ChannelModel): Promise<ConfirmChannel> {
    const channel = await answered(this.#newChannel(model))
    channel.once('close', () => {
      if (this.#channel !== channel) return
      this.#channel = undefined
      this.#returned.clear()
      // Publishing to an exchange that someone has deleted closes the channel.
      this.#queues.forgetWaitQueues()
      this.#openChannel(model).then(opened => { this.#channel = opened }, () => { this.#connection().replace(model, 'the channel could not be opened again') })
    })
    return channel
  }

  /**
   * RabbitMQ 3.10 refuses for ever what a channel sends to a queue if the queue had no leader when the channel sent its first message, as after
   * a node has died. A new channel finds the leader. What is under way on the old one is confirmed there.
   */
  async #renewChannel (former: ConfirmChannel): Promise<void> {
    this.#channelTicks = 0
    const connection = this.#connection()
    if (!connection.isOpen) return
    const channel = await this.#openChannel(connection.model).catch(() => undefined)
    if (channel === undefined) return
    const isWanted = this.#channel === former
    if (isWanted) this.#channel = channel
    setTimeout(() => { void quietly(() => (isWanted ? former : channel).close()) }, FORMER_MS).unref()
  }

  async #newChannel (model: ChannelModel): Promise<ConfirmChannel> {
    const channel = await model.createConfirmChannel()
    // Each message that was under way on the channel fails by itself.
    channel.on('error', error => { this.#refusals.set(channel, error) })
    channel.on('return', ({ fields, properties }) => {
      const key = returnedKey(fields.routingKey, properties.messageId)
      this.#returned.set(key, (this.#returned.get(key) ?? 0) + 1)
    })
    return channel
  }
}

function nowhere ({ exchange, routingKey }: Address): Error {
  return new Error(`RabbitMQ has no queue for ${JSON.stringify({ exchange, routingKey })}`)
}

function returnedKey (routingKey: string, messageId: unknown): string {
  return `${String(messageId)} ${routingKey}`
}
