/** A channel on which jobs come. */
import type { Channel, ChannelModel, ConsumeMessage } from 'amqplib'
import type { Delivery } from '../engine.js'
import { cork } from '../cork.js'
import { answered, quietly, socketOf } from './connection.js'

/** The protocol has no larger number. */
const MAX_PREFETCH = 65_535

/** A job that this process runs. */
export interface TakenJob {
  readonly delivery: Delivery
  /** The last message in which the job has come: a lost connection brings it once more. */
  message: ConsumeMessage
  /** The channel on which the message came, until that channel closes. */
  intake: Intake | undefined
  /** The tick at which the job came. */
  readonly tick: number
}

export interface IntakeEvents {
  readonly message: (intake: Intake, message: ConsumeMessage) => void
  /** The server has cancelled a consumer, because the queue was deleted or has moved. */
  readonly cancelled: (intake: Intake) => void
  /** @param reason why the server has closed the channel. Undefined if its connection was lost, or this side has closed it */
  readonly closed: (intake: Intake, reason: Error | undefined) => void
}

export class Intake {
  /** The jobs that are not acknowledged, in the order in which they came. */
  readonly jobs = new Set<TakenJob>()
  /** The most jobs that come together. */
  seats = 0
  readonly #channel: Channel
  readonly #queue: string
  readonly #events: IntakeEvents
  readonly #tags: string[] = []
  #isLeaving = false
  #isLeft = false
  #closing: Promise<void> | undefined

  private constructor (channel: Channel, queue: string, events: IntakeEvents) {
    this.#channel = channel
    this.#queue = queue
    this.#events = events
    let reason: Error | undefined
    channel.on('error', error => { reason = error })
    channel.once('close', () => { events.closed(this, reason) })
  }

  static async open (model: ChannelModel, queue: string, events: IntakeEvents): Promise<Intake> {
    return new Intake(await answered(model.createChannel()), queue, events)
  }

  /** The jobs that the channel has, or may still get. */
  get taken (): number {
    return this.#isLeft ? this.jobs.size : Math.max(this.seats, this.jobs.size)
  }

  /** Subscribes for more jobs, unless the channel is being left. Each consumer of a channel has a limit of its own. */
  async subscribe (seats: number): Promise<void> {
    const count = Math.min(seats, MAX_PREFETCH)
    const consumerTag = `worker-${this.#tags.length + 1}`
    this.seats += count
    try {
      await answered(this.#channel.prefetch(count))
      // `leave` would not know this consumer, which would take jobs without end.
      if (this.#isLeaving) return
      this.#tags.push(consumerTag)
      await answered(this.#channel.consume(this.#queue, message => {
        if (message === null) this.#events.cancelled(this)
        else this.#events.message(this, message)
      }, { consumerTag }))
    } catch (error) {
      if (!this.#isLeaving) throw error
    }
  }

  /** Takes no further jobs, and closes the channel when those that have come are acknowledged. */
  async leave (): Promise<void> {
    if (this.#isLeaving) return
    this.#isLeaving = true
    // What is on its way comes before the answer.
    await Promise.all(this.#tags.map(tag => quietly(() => answered(this.#channel.cancel(tag)))))
    this.#isLeft = true
    this.#closeIfEmpty()
  }

  acknowledge (job: TakenJob): void {
    this.jobs.delete(job)
    this.#settle(() => { this.#channel.ack(job.message) })
  }

  /** Returns a job to the queue as it is, or drops it, which sends it where the queue sends what is dropped. */
  reject (job: TakenJob, isToReturn: boolean): void {
    this.jobs.delete(job)
    this.#settle(() => { this.#channel.nack(job.message, false, isToReturn) })
  }

  /** Resolves when the server knows all that was sent before. */
  async close (): Promise<void> {
    this.#closing ??= quietly(() => this.#channel.close())
    await this.#closing
  }

  #settle (send: () => void): void {
    try {
      send()
      cork(socketOf(this.#channel))
    } catch {
      // The channel is about to close, and the server will deliver the message again.
    }
    this.#closeIfEmpty()
  }

  #closeIfEmpty (): void {
    if (this.#isLeft && this.jobs.size === 0) void this.close()
  }
}
