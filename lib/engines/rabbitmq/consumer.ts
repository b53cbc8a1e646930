/** The consuming side of the RabbitMQ engine: one consumer per definition. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { ChannelModel, ConsumeMessage } from 'amqplib'
import type { Delivery, TaskSpec, Verdict } from '../engine.js'
import { plainError } from '../plain-error.js'
import { Intake, type IntakeEvents, type TakenJob } from './intake.js'
import { copyOf, failedCopyOf, isUncounted, toDelivery, waitOf } from './messages.js'
import { TooLargeError, type RabbitMqPublisher } from './publisher.js'
import type { Address, RabbitMqQueues } from './queues.js'

/** Milliseconds until something that the server did not accept is tried again. */
const RECOVERY_MS = 500
/** Ticks, of half a second, after which a job does not share its channel with further ones. */
const LONG_TICKS = 2
/** Milliseconds that the copy of a job waits whose queue has not counted its last attempt. The message itself is acknowledged meanwhile, and a crash does not bring it again. */
const UNCOUNTED_MS = 1_000

export interface RabbitMqConsumerOptions {
  readonly spec: TaskSpec
  readonly queues: RabbitMqQueues
  readonly publisher: RabbitMqPublisher
  readonly run: (delivery: Delivery) => Promise<Verdict>
  readonly onError: (error: Error) => void
}

/**
 * The server closes a channel whose oldest job runs for longer than `consumer_timeout`, and gives all jobs of the channel to somebody else.
 * So a channel takes jobs only while the oldest one is young. After that another channel takes the next jobs, for as many seats as are free.
 */
export class RabbitMqConsumer {
  /** Ticks since something has come, or since the last subscription. */
  quietTicks = 0
  readonly #options: RabbitMqConsumerOptions
  readonly #queue: string
  readonly #address: Address
  readonly #events: IntakeEvents
  /** The current connection. */
  #model: ChannelModel | undefined
  /** The channel that takes jobs. */
  #current: Intake | undefined
  /** The channels that take no jobs any more, for as long as jobs run that came on them. */
  readonly #former = new Set<Intake>()
  /** Jobs that run here, and whose channel is closed: the server will deliver them again. */
  readonly #lost = new Set<TakenJob>()
  #running = 0
  #tick = 0
  /** How often the queue had been declared again at the last subscription. */
  #renewals = 0
  #isPaused = false
  #isFilling = false
  #onIdle: (() => void) | undefined

  constructor (options: RabbitMqConsumerOptions) {
    this.#options = options
    this.#queue = options.queues.queueOf(options.spec.name)
    this.#address = options.queues.addressOf(this.#queue)
    this.#events = {
      message: (intake, message) => { this.#receive(intake, message) },
      cancelled: intake => { this.#onCancelled(intake) },
      closed: (intake, reason) => { this.#onClosed(intake, reason) }
    }
  }

  /** Subscribes on a new connection. */
  attach (model: ChannelModel): void {
    this.#model = model
    void this.#fill()
  }

  /** The connection is lost. */
  detach (): void {
    this.#model = undefined
  }

  get hasRoom (): boolean {
    return this.#current !== undefined && this.#freeSeats + this.#current.seats > this.#current.jobs.size
  }

  /** To be called each half second. */
  tick (): void {
    this.#tick++
    this.quietTicks++
    const [oldest] = this.#current?.jobs ?? []
    const isLong = oldest !== undefined && this.#tick - oldest.tick >= LONG_TICKS
    // The publisher has found that the queue was deleted, and has declared it again. RabbitMQ 3.10 may not tell the consumer.
    const isOutdated = this.#current !== undefined && this.#renewals !== this.#address.flow.renewals
    if (isLong || isOutdated) this.renew()
  }

  /** Takes jobs on a new channel from now on. */
  renew (): void {
    this.quietTicks = 0
    void this.#retire()
  }

  /** Takes no further jobs. Jobs that are on their way are returned to their queue. */
  async pause (): Promise<void> {
    this.#isPaused = true
    await this.#retire()
  }

  /** Resolves when nothing runs and the server knows every verdict. */
  async idle (): Promise<void> {
    while (this.#running > 0) await new Promise<void>(resolve => { this.#onIdle = resolve })
    await Promise.all(Array.from(this.#former, intake => intake.close()))
  }

  /** What a lost channel had is not counted: those jobs come again, and need a seat for that. */
  get #freeSeats (): number {
    let free = this.#options.spec.concurrency - (this.#current?.seats ?? 0)
    for (const { taken } of this.#former) free -= taken
    return free
  }

  async #retire (): Promise<void> {
    const intake = this.#current
    this.#current = undefined
    if (intake === undefined) return
    this.#former.add(intake)
    await intake.leave()
    // No more jobs come on that channel, so the seats that it has not used are free.
    void this.#fill()
  }

  /** Subscribes for all seats that are free. */
  async #fill (): Promise<void> {
    if (this.#isFilling) return
    this.#isFilling = true
    while (this.#model !== undefined && !this.#isPaused && this.#freeSeats > 0) {
      const model = this.#model
      try {
        await this.#options.queues.declare(model, this.#queue)
        if (this.#current === undefined) this.#renewals = this.#address.flow.renewals
        const intake = this.#current ?? await Intake.open(model, this.#queue, this.#events)
        if (this.#isPaused || this.#model !== model) {
          void intake.close()
          continue
        }
        this.#current = intake
        // Jobs may have come on a former channel meanwhile. To the server a limit of 0 is none.
        if (this.#freeSeats > 0) await intake.subscribe(this.#freeSeats)
      } catch (error) {
        void this.#retire()
        // A lost connection is reported elsewhere.
        if (this.#model !== model) continue
        if ((error as { code?: unknown }).code === 404) this.#options.queues.forget(this.#queue)
        else this.#report(error)
        await sleep(RECOVERY_MS, undefined, { ref: false })
      }
    }
    this.#isFilling = false
  }

  /** The messages of several definitions are the same, so that a log has one line for all of them. */
  #report (error: unknown): void {
    const { message } = plainError(error)
    this.#options.onError(plainError(error, message.replaceAll(this.#queue, '…').replace(/on channel \d+/, 'on a channel')))
  }

  #onCancelled (intake: Intake): void {
    this.#options.queues.forget(this.#queue)
    if (this.#current !== intake) return
    this.#report(new Error('RabbitMQ has cancelled the consumer of a queue, which was deleted or has moved'))
    this.renew()
  }

  #onClosed (intake: Intake, reason: Error | undefined): void {
    if (this.#current === intake) this.#current = undefined
    this.#former.delete(intake)
    for (const job of intake.jobs) {
      job.intake = undefined
      this.#lost.add(job)
    }
    if (reason !== undefined && (reason as { code?: unknown }).code !== 404) this.#report(reason)
    // A channel closes before its connection says that it is lost.
    setImmediate(() => { void this.#fill() })
  }

  #receive (intake: Intake, message: ConsumeMessage): void {
    this.quietTicks = 0
    const lost = message.fields.redelivered && this.#lost.size > 0 ? this.#lostJobOf(message) : undefined
    if (lost !== undefined) {
      this.#lost.delete(lost)
      lost.message = message
      lost.intake = intake
      intake.jobs.add(lost)
      return
    }
    const delivery = toDelivery(this.#options.spec.name, this.#queue, message)
    const job: TakenJob = { delivery, message, intake, tick: this.#tick }
    intake.jobs.add(job)
    this.#running++
    const waitMs = waitOf(message)
    if (this.#isPaused) void this.#settle(job, { kind: 'released' })
    else if (isUncounted(message)) void this.#replace(job, () => this.#publishLater(job, delivery.attempt - 1, Math.max(waitMs, UNCOUNTED_MS)))
    else if (waitMs > 0) void this.#replace(job, () => this.#publishLater(job, delivery.attempt - 1, waitMs))
    else void this.#options.run(delivery).then(verdict => this.#settle(job, verdict))
  }

  /** The job that runs here and came in the same message. Other messages may have the same id, or none, because other programs choose their own. */
  #lostJobOf ({ properties, content }: ConsumeMessage): TakenJob | undefined {
    for (const job of this.#lost) {
      if (job.message.properties.messageId === properties.messageId && job.message.content.equals(content)) return job
    }
    return undefined
  }

  async #settle (job: TakenJob, verdict: Verdict): Promise<void> {
    if (verdict.kind === 'done' || verdict.kind === 'cancelled') this.#end(job)
    else await this.#replace(job, () => this.#publish(job, verdict), verdict.kind !== 'failed')
  }

  /** Publishes what takes the place of a message, and acknowledges the message after that. If the process dies in between, both are there, and never none. */
  async #replace (job: TakenJob, publish: () => Promise<void>, isToReturn = true): Promise<void> {
    // After a connection is lost, the server accepts no acknowledgement for it, and delivers its messages again.
    while (job.intake !== undefined) {
      try {
        await publish()
        break
      } catch (error) {
        this.#report(error)
        if (error instanceof TooLargeError) {
          // Somebody has lowered the limit since the job was stored. The server does not check it when it moves the message itself.
          job.intake.reject(job, isToReturn)
          job.intake = undefined
          void this.#fill()
          break
        }
        await sleep(RECOVERY_MS)
      }
    }
    this.#end(job)
  }

  async #publish (job: TakenJob, verdict: Exclude<Verdict, { kind: 'done' | 'cancelled' }>): Promise<void> {
    const { publisher, queues, spec } = this.#options
    const { message, delivery: { id, attempt } } = job
    switch (verdict.kind) {
      case 'released':
        return await this.#publishAgain(job, attempt - 1)
      case 'retry':
        if (verdict.delayMs <= 0) return await this.#publishAgain(job, attempt)
        return await this.#publishLater(job, attempt, verdict.delayMs)
      case 'failed': {
        const keepMs = Math.min(Math.ceil(spec.keep.failed * 1000), 2 ** 32 - 1)
        if (keepMs === 0) return
        const properties = failedCopyOf(message, { id, attempt: Math.min(attempt, spec.attempts), error: verdict.error, keepMs, room: publisher.room })
        await publisher.publish(queues.addressOf(queues.deadQueueOf(spec.name)), message.content, properties)
      }
    }
  }

  async #publishAgain ({ message, delivery: { id } }: TakenJob, attempts: number): Promise<void> {
    await this.#options.publisher.publish(this.#address, message.content, copyOf(message, { id, attempts }))
  }

  async #publishLater ({ message, delivery: { id } }: TakenJob, attempts: number, delayMs: number): Promise<void> {
    await this.#options.publisher.publishLater(this.#queue, delayMs, message.content, waitMs => copyOf(message, { id, attempts, waitMs }))
  }

  #end (job: TakenJob): void {
    this.#lost.delete(job)
    const { intake } = job
    if (intake !== undefined) {
      intake.acknowledge(job)
      // The seat of a channel that takes no jobs any more is free for the current one.
      if (intake !== this.#current) void this.#fill()
    }
    this.#running--
    if (this.#running === 0) this.#onIdle?.()
  }
}
