/** One connection to RabbitMQ, which is opened, set up, and restored until it is closed. */
import type { Socket } from 'node:net'
import { connect, type Channel, type ChannelModel, type RecoveringChannelModel, type SocketOptions } from 'amqplib'
import { within } from '../../limits.js'
import { messageOf, plainError } from '../plain-error.js'

/** Milliseconds without a byte after which an attempt to connect has failed. */
const CONNECT_MS = 2_000
/** Milliseconds for the declarations on a new connection. Each new quorum queue takes some 10 to 50. */
const SET_UP_MS = 10_000
/** Milliseconds for a connection to close by itself. */
const GOODBYE_MS = 500
/** Most milliseconds between two attempts to connect. They are few, because a job that cannot be stored is a 503. */
const RECONNECT_MS = 1_000

export interface RabbitMqConnectionOptions {
  readonly url: string
  readonly socket: SocketOptions | undefined
  /** The name that the server shows for this connection. */
  readonly name: string
  /** Declares queues and opens channels on each new connection. A rejection ends that connection. */
  readonly setUp: (model: ChannelModel) => Promise<void>
  /** Called when the connection was lost, or could not be restored yet. */
  readonly onError: (error: Error) => void
}

/**
 * amqplib restores the connection. The channels are opened on the real connection and not on amqplib's wrapper of it, so that what is under
 * way on a lost connection fails, and is never sent again.
 */
export class RabbitMqConnection {
  readonly #options: RabbitMqConnectionOptions
  #recovering: RecoveringChannelModel | undefined
  /** The connection that is set up. */
  #model: ChannelModel | undefined
  /** The connection that is set up, or is being set up. */
  #latestModel: ChannelModel | undefined
  #lastError = 'it has not been reached yet'
  #isClosing = false

  constructor (options: RabbitMqConnectionOptions) {
    this.#options = options
  }

  /** Connects, and restores the connection from then on. Rejects when the first attempt fails. */
  async open (): Promise<void> {
    try {
      await (await this.#start(0)).waitForConnect()
    } catch (error) {
      throw plainError(error)
    }
  }

  /** Connects, at the first attempt or later, and restores the connection from then on. */
  async keepOpening (): Promise<void> {
    await this.#start(Infinity)
  }

  /** @throws an error that says why there is no connection */
  get model (): ChannelModel {
    if (this.#model === undefined) throw new Error(`There is no connection to RabbitMQ: ${this.#lastError}`)
    return this.#model
  }

  /** Never rejects. */
  async close (): Promise<void> {
    this.#isClosing = true
    this.#model = undefined
    await within(GOODBYE_MS, quietly(async () => { await this.#recovering?.close() }), () => undefined)
    if (this.#latestModel !== undefined) destroy(this.#latestModel)
  }

  /** Resolves before there is a connection. */
  async #start (initialMaxRetries: number): Promise<RecoveringChannelModel> {
    const { url, socket, name } = this.#options
    const recovering = await connect(url, {
      noDelay: true,
      timeout: CONNECT_MS,
      ...socket,
      clientProperties: { connection_name: name, ...socket?.clientProperties },
      recovery: {
        setup: (model: ChannelModel) => this.#setUp(model),
        waitForConnect: false,
        initialMaxRetries,
        calculateDelay: attempt => Math.min(50 * attempt, RECONNECT_MS)
      }
    })
    this.#recovering = recovering
    recovering.on('connect', model => { this.#model = model })
    recovering.on('disconnect', error => { this.#onLost(error) })
    recovering.on('connect-failed', error => { this.#onLost(error) })
    // An `error` is followed by a `disconnect` with the same error.
    recovering.on('error', () => {})
    return recovering
  }

  /** amqplib does not notice the loss of a connection before it is set up, so this does. */
  async #setUp (model: ChannelModel): Promise<void> {
    this.#latestModel = model
    let isLost = false
    const lost = new Promise<void>(resolve => {
      model.once('close', () => {
        isLost = true
        resolve()
      })
    })
    model.on('error', () => {})
    try {
      await within(SET_UP_MS, this.#options.setUp(model), () => { throw new Error(`the server did not answer within ${SET_UP_MS} ms`) })
      if (isLost || this.#isClosing) throw new Error('the connection was lost at once')
    } catch (error) {
      destroy(model)
      // Otherwise amqplib would wait for ever to close a connection that has lost its socket and does not know it.
      await lost
      throw error
    }
  }

  #onLost (error: unknown): void {
    this.#model = undefined
    this.#lastError = messageOf(error)
    if (!this.#isClosing) this.#options.onError(new Error(`There is no connection to RabbitMQ: ${this.#lastError}`))
  }
}

/** Opens a channel for one use. What the server refuses closes this channel, and no other. */
export async function onChannel<T> (model: ChannelModel, use: (channel: Channel) => Promise<T>): Promise<T> {
  const channel = await model.createChannel()
  // The call that the server refused rejects.
  channel.on('error', () => {})
  try {
    return await use(channel)
  } finally {
    await quietly(() => channel.close())
  }
}

/** Calls something that throws or rejects when the connection is lost, which is reported elsewhere. */
export async function quietly (call: () => Promise<unknown>): Promise<void> {
  try {
    await call()
  } catch {}
}

/** Cuts a connection, so that amqplib restores it. amqplib's own `close` waits for the server, and only an error tells amqplib of the end of a socket. */
export function destroy (model: ChannelModel): void {
  const socket = socketOf(model)
  if (!socket.destroyed) socket.destroy(new Error('the connection was cut'))
}

/** The socket of a connection. The types of amqplib do not have it. */
export function socketOf ({ connection }: ChannelModel | Channel): Socket {
  return (connection as unknown as { readonly stream: Socket }).stream
}
