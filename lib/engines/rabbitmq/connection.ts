/** One connection to RabbitMQ, which is opened, set up, and restored until it is closed. */
import type { Socket } from 'node:net'
import { connect, type Channel, type ChannelModel, type SocketOptions } from 'amqplib'
import { within } from '../../limits.js'
import { messageOf, plainError } from '../plain-error.js'

/** Milliseconds without a byte after which an attempt to connect has failed. */
const CONNECT_MS = 2_000
/** Milliseconds after which an attempt to connect has failed, whatever the server says meanwhile. */
const HANDSHAKE_MS = 6_000
/** Milliseconds without an answer after which a call has failed. The server takes some 10 to 50 to declare a quorum queue. */
const SILENCE_MS = 10_000
/** Milliseconds for a connection to close by itself. */
const GOODBYE_MS = 500
/** Most milliseconds between two rounds of attempts. They are few, because a job that cannot be stored is a 503. */
const RECONNECT_MS = 1_000

export interface RabbitMqConnectionOptions {
  /** Servers of one cluster. Each attempt to connect takes the next one. */
  readonly urls: readonly string[]
  readonly socket: SocketOptions | undefined
  /** The name that the server shows for this connection. */
  readonly name: string
  /** Called with each new connection. A rejection ends that connection. */
  readonly setUp: (model: ChannelModel) => Promise<void>
  /** Called when the connection was lost, and when a server refuses to restore it. Never called again for the same outage, unless the reason is another one. */
  readonly onError: (error: Error) => void
}

interface Opened {
  readonly model: ChannelModel
  /** Resolves with the reason when the connection is lost. */
  readonly lost: Promise<unknown>
}

export class RabbitMqConnection {
  readonly #options: RabbitMqConnectionOptions
  /** The index of the next URL. The first one is random, so that the connections of many processes are spread. */
  #next: number
  /** The connection that is set up. */
  #model: ChannelModel | undefined
  /** Destroys the socket that is open, or being opened. */
  #cutter = new AbortController()
  /** Why this side has cut the connection. */
  #cutBecause: string | undefined
  #lastError = 'it has not been reached yet'
  #isClosing = false
  /** Ends the pause before the next round. */
  #hurry: (() => void) | undefined

  constructor (options: RabbitMqConnectionOptions) {
    this.#options = options
    this.#next = Math.floor(Math.random() * options.urls.length)
  }

  /** Connects, and restores the connection from then on. Rejects when no server can be reached now. */
  async open (): Promise<void> {
    void this.#keepOpen(await this.#openAny())
  }

  /** Connects, now or later, and restores the connection from then on. */
  keepOpening (): void {
    void this.#keepOpen(undefined)
  }

  /** @throws an error that says why there is no connection */
  get model (): ChannelModel {
    if (this.#model === undefined) throw new Error(this.#reason)
    return this.#model
  }

  get isOpen (): boolean {
    return this.#model !== undefined
  }

  /** Gives a connection up, if it is still the current one, and opens another one. */
  replace (model: ChannelModel, because: string): void {
    if (this.#model !== model) return
    this.#cutBecause = because
    this.#model = undefined
    this.#cutter.abort()
  }

  /** Never rejects. No socket and no timer is left. */
  async close (): Promise<void> {
    this.#isClosing = true
    this.#hurry?.()
    const model = this.#model
    this.#model = undefined
    if (model !== undefined) await within(GOODBYE_MS, quietly(() => model.close()), () => undefined)
    this.#cutter.abort()
  }

  get #reason (): string {
    return `There is no connection to RabbitMQ: ${this.#lastError}`
  }

  async #keepOpen (first: Opened | undefined): Promise<void> {
    let failures = 0
    let opened = first
    while (!this.#isClosing) {
      try {
        opened ??= await this.#openAny()
        failures = 0
        const reason = await opened.lost
        this.#lastError = this.#cutBecause ?? messageOf(reason)
        this.#report()
      } catch (error) {
        this.#lastError = messageOf(error)
        if (error instanceof Refusal) this.#report()
      }
      this.#model = undefined
      opened = undefined
      failures++
      if (!this.#isClosing) await this.#pause(Math.min(50 * failures, RECONNECT_MS))
    }
  }

  /** One round: each URL once. */
  async #openAny (): Promise<Opened> {
    const { urls } = this.#options
    const errors = new Map<number, Error>()
    while (errors.size < urls.length) {
      const index = this.#next
      this.#next = (index + 1) % urls.length
      try {
        return await this.#openOne(urls[index] as string)
      } catch (error) {
        errors.set(index, explained(error))
      }
      if (this.#isClosing) break
    }
    // The order of the option, and not that of the attempts: the same outage has the same message each time.
    const messages = new Set([...errors.keys()].sort((a, b) => a - b).map(index => messageOf(errors.get(index))))
    const all = [...errors.values()]
    const Kind = all.every(error => error instanceof Refusal) ? Refusal : Error
    throw all.length === 1 ? all[0] : new Kind([...messages].join('; '))
  }

  async #openOne (url: string): Promise<Opened> {
    const { socket, name, setUp } = this.#options
    const cutter = this.#cutter = new AbortController()
    this.#cutBecause = undefined
    // Node destroys a socket when its signal is aborted, whatever state the socket is in.
    const options = { noDelay: true, timeout: CONNECT_MS, ...socket, clientProperties: { connection_name: name, ...socket?.clientProperties }, signal: cutter.signal }
    try {
      const model = await within(HANDSHAKE_MS, connect(url, options), () => { throw new Error(`the server did not open the connection within ${HANDSHAKE_MS} ms`) })
      let reason: unknown
      const lost = new Promise<unknown>(resolve => {
        model.once('close', error => {
          reason = error ?? new Error('the connection was closed')
          this.#model = undefined
          // amqplib ends its side of the socket. The other side may be silent.
          setTimeout(() => { cutter.abort() }, GOODBYE_MS).unref()
          resolve(reason)
        })
      })
      // An `error` is followed by a `close` with the same error.
      model.on('error', () => {})
      try {
        checkServer(model)
        await setUp(model)
        if (this.#isClosing) throw new Error('the engine was stopped')
      } catch (error) {
        throw reason ?? error
      }
      if (reason !== undefined) throw reason
      this.#model = model
      return { model, lost }
    } catch (error) {
      cutter.abort()
      throw error
    }
  }

  #report (): void {
    if (!this.#isClosing) this.#options.onError(new Error(this.#reason))
  }

  async #pause (ms: number): Promise<void> {
    await new Promise<void>(resolve => {
      const timer = setTimeout(resolve, ms)
      this.#hurry = () => { clearTimeout(timer); resolve() }
    })
  }
}

/** The server itself does not accept the connection. */
class Refusal extends Error {}

/** amqplib hides why a server refuses a virtual host. */
function explained (error: unknown): Error {
  const message = messageOf(error)
  if (/got <ConnectionClose/.test(message)) return new Refusal('the server closed the connection while it was opened: the user, the password, or the right to the virtual host may be wrong')
  if (/closed abruptly during opening/.test(message)) {
    return new Error('the server closed the connection while it was opened: it is not ready, or the user, the password, or the right to the virtual host may be wrong')
  }
  return /^Handshake terminated by server/.test(message) ? new Refusal(message) : plainError(error)
}

/** What the engine uses and nobody promises: said once, and not found out by a job that is lost. */
function checkServer ({ connection }: ChannelModel): void {
  const { product, version } = connection.serverProperties
  const [major = 0, minor = 0] = String(version).split('.').map(Number)
  if (product !== 'RabbitMQ' || !(major > 3 || (major === 3 && minor >= 10))) {
    throw new Refusal(`the server is ${String(product).slice(0, 50)} ${String(version).slice(0, 50)}, and the engine knows RabbitMQ 3.10 or later`)
  }
  const { stream } = connection as { readonly stream?: Partial<Socket> }
  if (typeof stream?.cork !== 'function') throw new Refusal('this version of amqplib is not known: its connection has no stream. The engine knows amqplib 2.3')
}

/** Opens a channel for one use. What the server refuses closes this channel, and no other. */
export async function onChannel<T> (model: ChannelModel, use: (channel: Channel) => Promise<T>): Promise<T> {
  const channel = await answered(model.createChannel())
  // The call that the server refused rejects.
  channel.on('error', () => {})
  try {
    return await use(channel)
  } finally {
    void quietly(() => channel.close())
  }
}

/** Settles as a call to the server does, or rejects if the server is silent. */
export async function answered<T> (call: Promise<T>): Promise<T> {
  return await within(SILENCE_MS, call, () => { throw new Error(`the server did not answer within ${SILENCE_MS} ms`) })
}

/** Calls something that throws or rejects when the connection is lost, which is reported elsewhere. */
export async function quietly (call: () => Promise<unknown>): Promise<void> {
  try {
    await call()
  } catch {}
}

/** The socket of a connection. The types of amqplib do not have it. */
export function socketOf ({ connection }: ChannelModel | Channel): Socket {
  return (connection as unknown as { readonly stream: Socket }).stream
}
