/** Reads a queue from its head, and holds what it has read until its channel closes. */
import type { Channel, ConsumeMessage } from 'amqplib'
import { within } from '../../limits.js'
import { answered } from './connection.js'
import { stateOf } from './queue-state.js'

/** Messages of the first consumer, by which their size is estimated. */
const FIRST = 64
/** Fewest messages of a consumer, and how many times those of the consumer before it may have at most. */
const FEWEST = 16
const GROWTH = 16
/** The protocol has no larger number. */
const MOST = 65_535
/** Bytes that the server may send at a time: it has all messages of a consumer in its memory until they are written. */
const BYTES = 32 * 2 ** 20
/** Bytes of a message around its body, as an estimate. */
const AROUND = 500
/** Consumers of the channel. The server puts the messages of more of them back in another order. */
const MAX_CONSUMERS = 32
/** Milliseconds without a message after which the queue may have no more. */
const QUIET_MS = 250
/**
 * How often in a row that has to be so if fewer have come than the queue had: the rest may have expired, or may be on its way, and the server
 * answers a question before it has sent all messages.
 */
const QUIET_TIMES = 4
/** Questions to the queue after which it has all acknowledgements: one for those that were sent, one for those that were kept back, and one more. */
const ACKNOWLEDGING_ASKS = 3

export class DeadReader {
  /** Messages that have come. */
  received = 0
  /** Resolves when the channel is closed, or its connection is lost. */
  readonly closed: Promise<void>
  readonly #channel: Channel
  readonly #queue: string
  #bytes = 0
  #consumers = 0
  /** Messages of the last consumer, and of all. */
  #share = 0
  #capacity = 0
  #isWanted = true
  #isClosed = false
  #closedBy: Error | undefined
  #wake: (() => void) | undefined

  /** @param channel a channel for this reader alone */
  constructor (channel: Channel, queue: string) {
    this.#channel = channel
    this.#queue = queue
    channel.on('error', error => { this.#closedBy = error })
    this.closed = new Promise(resolve => {
      channel.once('close', () => {
        this.#end()
        resolve()
      })
    })
  }

  /**
   * Resolves when the queue has no further message, or `onMessage` has returned false.
   * @param expected the messages of the queue
   * @param end when to reject, by `performance.now()`
   */
  async read (expected: number, end: number, onMessage: (message: ConsumeMessage) => boolean): Promise<void> {
    const receive = (message: ConsumeMessage | null): void => {
      if (message === null) return this.#end()
      this.received++
      this.#bytes += AROUND + message.content.length
      if (this.#isWanted) this.#isWanted = onMessage(message)
      if (!this.#isWanted || this.received >= this.#capacity || this.received === expected) this.#wake?.()
    }
    await this.#subscribe(receive)
    let quiet = 0
    let isFirst = true
    while (this.#isWanted) {
      if (this.#isClosed) throw this.#closedBy ?? new Error('the channel was closed while the queue of failed jobs was read')
      if (performance.now() >= end) throw new Error(`the queue of failed jobs could not be read to its end in time, or another program holds messages of it: ${this.received} were read`)
      if (this.received >= this.#capacity) {
        await this.#subscribe(receive)
        continue
      }
      const before = this.received
      const isComplete = before >= expected
      if (isComplete && isFirst) isFirst = false
      else await this.#pause()
      const isQuiet = this.received === before && await this.#isTaken() && this.received === before
      quiet = isQuiet ? quiet + 1 : 0
      if (isQuiet && (isComplete || quiet === QUIET_TIMES)) return
    }
  }

  acknowledge (message: ConsumeMessage): void {
    this.#channel.ack(message)
  }

  /**
   * Resolves when the queue knows what was acknowledged. A channel of the server keeps acknowledgements back while the queue has not answered 32
   * others, and loses these when it closes.
   */
  async untilAcknowledged (): Promise<void> {
    // The server answers after it has handled what came before, and then sends what it had kept back.
    for (let asks = 0; asks < ACKNOWLEDGING_ASKS; asks++) await answered(this.#channel.checkQueue(this.#queue))
  }

  /** Subscribes for more messages. */
  async #subscribe (receive: (message: ConsumeMessage | null) => void): Promise<void> {
    if (this.#consumers === MAX_CONSUMERS) throw new Error(`the queue of failed jobs is too large: ${this.received} were read`)
    const fitting = this.received === 0 ? FIRST : Math.max(FEWEST, Math.floor(BYTES * this.received / this.#bytes))
    this.#share = Math.min(fitting, this.#consumers === 0 ? FIRST : this.#share * GROWTH, MOST)
    this.#capacity += this.#share
    await answered(this.#channel.prefetch(this.#share))
    await answered(this.#channel.consume(this.#queue, receive, { consumerTag: `search-${++this.#consumers}` }))
  }

  /** Resolves when the reader has something to do, or after a while. */
  async #pause (): Promise<void> {
    const woken = new Promise<void>(resolve => { this.#wake = resolve })
    await within(QUIET_MS, woken, () => undefined)
    this.#wake = undefined
  }

  /** Whether nobody else has or gets a message of the queue. Some may still be on their way here. Somebody else who holds a message counts as a consumer. */
  async #isTaken (): Promise<boolean> {
    const { messages, consumers } = await stateOf(this.#channel, this.#queue)
    return messages === 0 && consumers === this.#consumers
  }

  #end (): void {
    this.#isClosed = true
    this.#wake?.()
  }
}
