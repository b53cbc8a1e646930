/**
 * Starts jobs again that have failed for good. RabbitMQ does not look a message up, so the queue of failed jobs is read from its head until the
 * job is found. All that was read is held meanwhile, because what is put back comes again first. When the channel closes, the server puts
 * the messages back in their order, and each expires when it would have expired.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import type { Channel, ChannelModel, ConsumeMessage } from 'amqplib'
import { answered, onChannel, quietly } from './connection.js'
import { DeadReader } from './dead-reader.js'
import { copyOf } from './messages.js'
import type { RabbitMqPublisher } from './publisher.js'
import { orIfMissing, stateOf, untilReturned } from './queue-state.js'
import type { RabbitMqQueues } from './queues.js'

/** Milliseconds after which a search ends without a result. 100,000 jobs of a kilobyte take three to eight seconds. */
const SEARCH_MS = 15_000
/** Fewest and most milliseconds until a queue is tried again that somebody else reads. They differ, so that two processes do not meet again. */
const [LEAST_PAUSE_MS, MOST_PAUSE_MS] = [5, 40]
/** Most milliseconds for the server to put messages back. 100,000 take a quarter of a second. */
const RETURN_MS = 1_000
/** The code of the server for an exclusive queue of another connection. */
const LOCKED = 405
/** Most bytes of an id of a message. */
const MAX_ID = 255

export interface FailedJobsOptions {
  readonly queues: RabbitMqQueues
  readonly publisher: RabbitMqPublisher
  /** @throws an error that says why there is no connection */
  readonly model: () => ChannelModel
}

/** A call of `retry`. */
interface Wish {
  readonly id: string
  /** Whether the job has been started again. */
  isStarted: boolean
  /** Why it could not be started. */
  error: unknown
  readonly resolve: (isStarted: boolean) => void
  readonly reject: (error: unknown) => void
}

/** The failed jobs of one definition. */
export class FailedJobs {
  readonly #options: FailedJobsOptions
  readonly #task: string
  readonly #dead: string
  /** A queue without messages, which exists while this process reads the failed jobs. */
  readonly #lockQueue: string
  /** The calls whose search has not ended, by their ids. */
  readonly #open = new Map<string, Promise<boolean>>()
  /** The calls whose search has not begun. One search looks for all of them. */
  #waiting: Wish[] = []
  #isSearching = false

  constructor (task: string, options: FailedJobsOptions) {
    this.#options = options
    this.#task = task
    this.#dead = options.queues.deadQueueOf(task)
    this.#lockQueue = options.queues.lockQueueOf(task)
  }

  /** Resolves to whether there was such a job, when it is stored for its next start. Rejects if that is not known within 15 s. */
  async retry (id: string): Promise<boolean> {
    if (id === '' || Buffer.byteLength(id) > MAX_ID) return false
    const same = this.#open.get(id)
    if (same !== undefined) {
      // The job may fail again before that search has ended. Of two calls for one job only one is true.
      await same
      return false
    }
    const found = new Promise<boolean>((resolve, reject) => { this.#waiting.push({ id, isStarted: false, error: undefined, resolve, reject }) })
    this.#open.set(id, found)
    if (!this.#isSearching) void this.#searchAll()
    try {
      return await found
    } finally {
      this.#open.delete(id)
    }
  }

  /** Never rejects. */
  async #searchAll (): Promise<void> {
    this.#isSearching = true
    // Calls of the same moment share the first search.
    await Promise.resolve()
    while (this.#waiting.length > 0) {
      const wishes = this.#waiting
      this.#waiting = []
      let failure: { error: unknown } | undefined
      try {
        await this.#search(wishes)
      } catch (error) {
        failure = { error }
      }
      for (const { isStarted, error, resolve, reject } of wishes) {
        if (isStarted || (error === undefined && failure === undefined)) resolve(isStarted)
        else reject(error ?? failure?.error)
      }
    }
    this.#isSearching = false
  }

  async #search (wishes: readonly Wish[]): Promise<void> {
    const end = performance.now() + SEARCH_MS
    while (!await orIfMissing(true, async () => await this.#searchOnce(wishes, end))) {
      if (performance.now() >= end) throw new Error('another program reads the queue of failed jobs, or holds messages of it')
      await sleep(LEAST_PAUSE_MS + Math.random() * (MOST_PAUSE_MS - LEAST_PAUSE_MS))
    }
  }

  /** Resolves to false if somebody else reads the queue now, so that jobs may be hidden. */
  async #searchOnce (wishes: readonly Wish[], end: number): Promise<boolean> {
    const model = this.#options.model()
    const channel = await answered(model.createChannel())
    const reader = new DeadReader(channel, this.#dead)
    let isLocked = false
    try {
      isLocked = await this.#lock(channel)
      if (!isLocked) return false
      const { messages, consumers } = await stateOf(channel, this.#dead)
      if (consumers > 0) return false
      // The server says 0 also if it has not reached the leader of the queue, and this call does reach it.
      if (messages === 0) return await answered(channel.get(this.#dead)) === false
      await this.#read(reader, messages, wishes, end)
      return true
    } finally {
      // A call to close a channel does not end if its connection is lost meanwhile.
      await quietly(() => answered(Promise.race([channel.close(), reader.closed])))
      if (reader.received > 0) await quietly(() => onChannel(model, looking => untilReturned(looking, this.#dead, RETURN_MS)))
      if (isLocked) await quietly(() => onChannel(model, unlocking => answered(unlocking.deleteQueue(this.#lockQueue))))
    }
  }

  /**
   * An exclusive queue belongs to one connection, and is gone with it. Two readers of the failed jobs would each hold some of them, and put
   * them back in another order.
   */
  async #lock (channel: Channel): Promise<boolean> {
    try {
      await answered(channel.assertQueue(this.#lockQueue, { exclusive: true, durable: false }))
      return true
    } catch (error) {
      if ((error as { code?: unknown }).code === LOCKED) return false
      throw error
    }
  }

  async #read (reader: DeadReader, expected: number, wishes: readonly Wish[], end: number): Promise<void> {
    const wanted = new Map(wishes.map(wish => [wish.id, wish]))
    const starts: Array<Promise<void>> = []
    try {
      await reader.read(expected, end, message => {
        const id: unknown = message.properties.messageId
        const wish = typeof id === 'string' ? wanted.get(id) : undefined
        if (wish !== undefined) {
          // Another message of this id is another job.
          wanted.delete(wish.id)
          starts.push(this.#start(wish, message, reader))
        }
        return wanted.size > 0
      })
    } finally {
      await Promise.all(starts)
      if (starts.length > 0) await quietly(() => reader.untilAcknowledged())
    }
  }

  /** Publishes a copy, and acknowledges the message after that. If the process dies in between, both are there, and never none. Never rejects. */
  async #start (wish: Wish, message: ConsumeMessage, reader: DeadReader): Promise<void> {
    const { queues, publisher } = this.#options
    try {
      await publisher.publish(queues.addressOf(queues.queueOf(this.#task)), message.content, copyOf(message, { id: wish.id, attempts: 0 }))
      wish.isStarted = true
      reader.acknowledge(message)
    } catch (error) {
      wish.error = error
    }
  }
}
