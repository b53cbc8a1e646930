/** One connection to RabbitMQ: opened, set up, and restored for as long as it is wanted. */
import type { Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import { connect, type Channel, type ChannelModel, type SocketOptions } from 'amqplib'
import { within } from '../limits.js'

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

export class RabbitMqConnection {
  readonly #options: RabbitMqConnectionOptions
  #model: ChannelModel | undefined
  #lastError = 'it has not been reached yet'
  readonly #closing = new AbortController()

  constructor (options: RabbitMqConnectionOptions) {
    this.#options = options
  }

  /** The connection, where there is one. */
  get model (): ChannelModel | undefined {
    return this.#model
  }

  /** Aborts when it closes. */
  get closing (): AbortSignal {
    return this.#closing.signal
  }

  /** Opens it, and restores it from then on. Rejects when the first attempt fails; it is closed then. */
  async open (): Promise<void> {
    try {
      await this.#connect()
    } catch (error) {
      await this.close()
      throw plain(error)
    }
  }

  /** Opens it, at the first attempt or later. */
  keepOpen (): void {
    this.#connect().catch(async error => {
      this.#failed(error)
      await this.#restore()
    })
  }

  /** @throws an error that says why there is none */
  opened (): ChannelModel {
    if (this.#model === undefined) throw new Error(`There is no connection to RabbitMQ: ${this.#lastError}`)
    return this.#model
  }

  /** Never rejects. */
  async close (): Promise<void> {
    this.#closing.abort()
    const model = this.#model
    this.#model = undefined
    if (model === undefined) return
    await within(GOODBYE_MS, quietly(() => model.close()), () => undefined)
    destroy(model)
  }

  async #connect (): Promise<void> {
    const { url, socket, name, setUp } = this.#options
    const clientProperties = { connection_name: name, ...socket?.clientProperties }
    const model = await connect(url, { noDelay: true, timeout: CONNECT_MS, ...socket, clientProperties })
    let isLost = false
    // What it says is what it closes with.
    model.on('error', () => {})
    model.once('close', error => {
      isLost = true
      if (this.#model !== model) return
      this.#model = undefined
      this.#failed(error ?? new Error('the server has closed the connection'))
      void this.#restore()
    })
    try {
      await within(SET_UP_MS, setUp(model), () => { throw new Error(`the server did not answer within ${SET_UP_MS} ms`) })
      if (isLost || this.closing.aborted) throw new Error('the connection was lost at once')
    } catch (error) {
      destroy(model)
      throw error
    }
    this.#model = model
  }

  /** Without end. */
  async #restore (): Promise<void> {
    for (let attempt = 1; !this.closing.aborted; attempt++) {
      await sleep(Math.min(50 * attempt, RECONNECT_MS), undefined, { signal: this.closing }).catch(() => {})
      if (this.closing.aborted) return
      try {
        await this.#connect()
        return
      } catch (error) {
        this.#failed(error)
      }
    }
  }

  #failed (error: unknown): void {
    const { message } = plain(error)
    this.#lastError = message
    if (!this.closing.aborted) this.#options.onError(new Error(`There is no connection to RabbitMQ: ${message}`))
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

/**
 * To be called behind what was written: whatever else is written in this turn of the event loop leaves with it, in few system
 * calls. One for each message would cost more than all else that it does here.
 */
export function corkOf (model: ChannelModel): () => void {
  const socket = socketOf(model)
  const uncork = (): void => { socket.uncork() }
  // amqplib's own turn of writing has been ordered by then, and comes before.
  const uncorkBehind = (): void => { setImmediate(uncork) }
  return () => {
    if (socket.writableCorked > 0) return
    socket.cork()
    process.nextTick(uncorkBehind)
  }
}

/** amqplib's own `close` waits for the server, and hears of the end of a socket by an error alone. */
function destroy (model: ChannelModel): void {
  const socket = socketOf(model)
  if (!socket.destroyed) socket.destroy(new Error('the connection was cut'))
}

/** It is in no type of amqplib. */
function socketOf ({ connection }: ChannelModel): Socket {
  return (connection as unknown as { readonly stream: Socket }).stream
}
