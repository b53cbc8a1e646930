/** One connection to RabbitMQ: opened, set up, and restored for as long as it is wanted. */
import type { Socket } from 'node:net'
import { connect, type Channel, type ChannelModel, type RecoveringChannelModel, type SocketOptions } from 'amqplib'
import { within } from '../../limits.js'

/** Milliseconds without a byte after which an attempt to connect has failed. */
const CONNECT_MS = 2_000
/** Milliseconds for what is declared on a new connection: each quorum queue that is new takes some 10 to 50. */
const SET_UP_MS = 10_000
/** Milliseconds for saying goodbye. */
const GOODBYE_MS = 500
/** Milliseconds between two attempts to connect, at most: a job that cannot be stored is a 503. */
const RECONNECT_MS = 1_000

export interface RabbitMqConnectionOptions {
  readonly url: string
  readonly socket: SocketOptions | undefined
  /** What the server shows it as. */
  readonly name: string
  /** Declares, opens channels; for each new connection. What it rejects with ends that connection. */
  readonly setUp: (model: ChannelModel) => Promise<void>
  /** It was lost, or could not be restored yet. */
  readonly onError: (error: Error) => void
}

/**
 * amqplib restores the connection. Channels are not its wrapper's but the real connection's: what was under way on one that
 * is lost fails, and is never sent again.
 */
export class RabbitMqConnection {
  readonly #options: RabbitMqConnectionOptions
  #recovering: RecoveringChannelModel | undefined
  /** The one that is set up. */
  #model: ChannelModel | undefined
  /** That one, or the one that is being set up. */
  #latest: ChannelModel | undefined
  #lastError = 'it has not been reached yet'
  #isClosing = false

  constructor (options: RabbitMqConnectionOptions) {
    this.#options = options
  }

  /** Opens it, and restores it from then on. Rejects when the first attempt fails. */
  async open (): Promise<void> {
    try {
      await (await this.#start(0)).waitForConnect()
    } catch (error) {
      throw plain(error)
    }
  }

  /** Opens it, at the first attempt or later. */
  async keepOpening (): Promise<void> {
    await this.#start(Infinity)
  }

  /** @throws an error that says why there is none */
  opened (): ChannelModel {
    if (this.#model === undefined) throw new Error(`There is no connection to RabbitMQ: ${this.#lastError}`)
    return this.#model
  }

  /** Never rejects. */
  async close (): Promise<void> {
    this.#isClosing = true
    this.#model = undefined
    await within(GOODBYE_MS, quietly(async () => { await this.#recovering?.close() }), () => undefined)
    if (this.#latest !== undefined) destroy(this.#latest)
  }

  /** @returns at once */
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
    recovering.on('disconnect', error => { this.#failed(error) })
    recovering.on('connect-failed', error => { this.#failed(error) })
    // What it says is what it closes with.
    recovering.on('error', () => {})
    return recovering
  }

  /** amqplib does not look after a connection before it is set up. */
  async #setUp (model: ChannelModel): Promise<void> {
    this.#latest = model
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
      // amqplib waits for ever for the goodbye of one that has no socket and does not know it.
      await lost
      throw error
    }
  }

  #failed (error: unknown): void {
    this.#model = undefined
    this.#lastError = plain(error).message
    if (!this.#isClosing) this.#options.onError(new Error(`There is no connection to RabbitMQ: ${this.#lastError}`))
  }
}

/** Uses a channel of its own: what the server refuses closes it, and no other. */
export async function onChannel<T> (model: ChannelModel, use: (channel: Channel) => Promise<T>): Promise<T> {
  const channel = await model.createChannel()
  // The call that it refused rejects.
  channel.on('error', () => {})
  try {
    return await use(channel)
  } finally {
    await quietly(() => channel.close())
  }
}

/** Calls what throws, or rejects, where there is nobody at the other end. */
export async function quietly (call: () => Promise<unknown>): Promise<void> {
  try {
    await call()
  } catch {}
}

/** The message alone: what else an error of a client carries is not for a log. */
export function plain (error: unknown): Error {
  const { message, code } = error as Partial<NodeJS.ErrnoException>
  // Node gives several attempts to connect one error without a message.
  return new Error(message || code || String(error))
}

/** It closes, and is restored. amqplib's own `close` waits for the server, and hears of the end of a socket by an error alone. */
export function destroy (model: ChannelModel): void {
  const socket = socketOf(model)
  if (!socket.destroyed) socket.destroy(new Error('the connection was cut'))
}

/** It is in no type of amqplib. */
export function socketOf ({ connection }: ChannelModel | Channel): Socket {
  return (connection as unknown as { readonly stream: Socket }).stream
}
