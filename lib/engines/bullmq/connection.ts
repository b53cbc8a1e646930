/** The connections to Redis: how they are opened, replaced and closed. */
import { Cluster, Redis, type ClusterOptions, type RedisOptions } from 'ioredis'
import { attempt, readOr } from '../../foreign.js'
import { within } from '../../limits.js'
import type { ClusterForm, Place, SingleForm } from './connection-options.js'
import { cannotWrite } from './redis-errors.js'

export type Client = Redis | Cluster

/** Milliseconds for one attempt to connect, unless the options say otherwise. */
export const CONNECT_MS = 2000
/** Milliseconds for a connection to close by itself. */
export const GOODBYE_MS = 500
/** Milliseconds without a reply after which a connection counts as lost. */
export const SILENCE_MS = 5000
/** Milliseconds until the connections are replaced again, while the server goes on refusing writes. */
const REPLACE_MS = 1000
/** Milliseconds between two attempts of one worker to connect, while the server takes no further connection. */
const REFUSED_MS = 2000

/** What a connection may do while its server is away. */
export interface ConnectionKind {
  /** Rejects what cannot be sent, and what had no reply when the connection was lost. ioredis would send that again, perhaps never. */
  readonly rejectsEarly: boolean
}

/**
 * All connections of an engine. A server that is up and refuses writes, as an old master does after a failover, keeps its connections: when
 * one of them is told so, all of them are replaced. Once `close` was called, no connection opens again, in whatever state it was.
 */
export class Connections {
  readonly #place: Place
  readonly #onRefusal: (error: Error) => void
  readonly #all = new Set<Client>()
  /** The connections that wait for jobs, with the definitions whose jobs they wait for. */
  readonly #waiting = new Map<Client, string>()
  /** What `INFO` is to answer. BullMQ asks for it once per queue and worker. */
  #info: string | undefined
  #opening = ''
  #replacedAt = -Infinity
  #hasNoWaits = false
  #isClosed = false

  /** @param onRefusal is told that the server refuses writes */
  constructor (place: Place, onRefusal: (error: Error) => void) {
    this.#place = place
    this.#onRefusal = onRefusal
  }

  open ({ rejectsEarly }: ConnectionKind): Client {
    const isCluster = 'cluster' in this.#place
    const own = {
      maxRetriesPerRequest: rejectsEarly ? 0 : null,
      // This would take 4 % of the rate at which jobs run. Only on a cluster there is no other way to look after each node.
      ...(rejectsEarly || isCluster) && { socketTimeout: SILENCE_MS }
    }
    // The consumer goes on when its first attempt to connect fails.
    const connecting = { enableOfflineQueue: !rejectsEarly, lazyConnect: rejectsEarly }
    // One connection hears from the sentinels of a new primary, and the others follow it: each of them has several connections to the sentinels.
    const watches = !isCluster && this.#place.options.sentinels !== undefined && rejectsEarly
    const client = isCluster ? this.#openCluster(this.#place, own, connecting) : this.#openSingle(this.#place, { ...own, ...connecting, failoverDetector: watches })
    this.#adopt(client, () => this.#isClosed)
    if (watches) client.on('close', () => { this.#reconnectAll() })
    const duplicate = client.duplicate.bind(client) as (...args: unknown[]) => Client
    // BullMQ makes a second connection for each worker, on which it waits for jobs, and one for what listens to the events of a queue.
    Object.assign(client, { duplicate: (...args: unknown[]) => this.#openWaiting(client, duplicate, args) })
    return client
  }

  /** Calls a function that makes a worker, whose connection is then known to wait for jobs of this definition. */
  forTask<T> (name: string, make: () => T): T {
    this.#opening = name
    try {
      return make()
    } finally {
      this.#opening = ''
    }
  }

  /** What `INFO` answers from now on, on each connection. */
  answerInfo (text: string): void {
    this.#info = text
  }

  /** The definitions whose worker has no connection at this moment. */
  unserved (): string[] {
    return [...this.#waiting].filter(([client]) => client.status !== 'ready').map(([, name]) => name)
  }

  /** Ends the waits for jobs, so that each worker looks whether it is paused. */
  endWaits (): void {
    this.#hasNoWaits = true
    for (const client of this.#waiting.keys()) end(client)
  }

  /** Closes all connections, in whatever state each one is. Never rejects. */
  async close (): Promise<void> {
    this.endWaits()
    this.#isClosed = true
    await Promise.all([...this.#all].map(async client => {
      if (client.status === 'ready') await answered(GOODBYE_MS, client.quit()).catch(() => {})
      end(client)
    }))
  }

  #openSingle ({ url, options }: SingleForm, own: RedisOptions): Redis {
    const all = this.#withDefaults(options, own)
    return url === undefined ? new Redis(all) : new Redis(url, all)
  }

  #openCluster ({ cluster, options }: ClusterForm, own: RedisOptions, connecting: ClusterOptions): Cluster {
    // Each node ends with its connection, and the cluster connects again.
    const { retryStrategy, ...redisOptions } = this.#withDefaults(options.redisOptions ?? {}, own)
    return new Cluster([...cluster], { ...options, ...connecting, redisOptions, clusterRetryStrategy: times => this.#retryMs(times) })
  }

  #withDefaults (options: RedisOptions, own: RedisOptions): RedisOptions & { replyMapping: 'legacy' } {
    const theirs = options.reconnectOnError
    return {
      connectTimeout: CONNECT_MS,
      disconnectTimeout: GOODBYE_MS,
      // ioredis would wait for a sentinel that does not answer, and never ask the next one.
      sentinelCommandTimeout: CONNECT_MS,
      ...options,
      ...own,
      // BullMQ reads replies in the shape that they had up to Redis 6.
      replyMapping: 'legacy',
      retryStrategy: times => this.#retryMs(times),
      reconnectOnError: error => {
        if (cannotWrite(error)) this.#replaceAll(error)
        return readOr(false, () => theirs?.(error) ?? false)
      }
    }
  }

  #openWaiting (consumer: Client, duplicate: (...args: unknown[]) => Client, args: unknown[]): Client {
    // These may not end a wait that is as long as it should be. A wait ends when its connection is lost: ioredis would send the command
    // again, and a timer of BullMQ would outlive `stop`.
    const own: RedisOptions = { commandTimeout: undefined, socketTimeout: undefined, maxRetriesPerRequest: 0 }
    const connecting = { enableOfflineQueue: true, lazyConnect: false }
    let client: Client
    if (consumer instanceof Cluster) {
      const [nodes, override] = args as [unknown, { redisOptions?: RedisOptions } | undefined]
      client = duplicate(nodes, { ...override, ...connecting, redisOptions: { ...override?.redisOptions, ...own } })
    } else {
      const retryStrategy = (times: number): number | null => {
        return consumer.status === 'ready' && times > 10 ? REFUSED_MS * (0.5 + Math.random() / 2) : this.#retryMs(times)
      }
      client = duplicate({ ...args[0] as RedisOptions | undefined, ...own, ...connecting, failoverDetector: false, retryStrategy })
    }
    if (this.#opening !== '') this.#waiting.set(client, this.#opening)
    // What listens to events is closed when nobody waits for a result any more.
    else client.once('end', () => { this.#all.delete(client) })
    return this.#adopt(client, () => this.#hasNoWaits)
  }

  /** @param isOver tells whether the connection may not open any more */
  #adopt (client: Client, isOver: () => boolean): Client {
    const connect = client.connect.bind(client)
    const info = client.info.bind(client) as (...args: unknown[]) => Promise<string>
    Object.assign(client, {
      // ioredis and BullMQ connect again where they find a connection that has ended.
      connect: async (...args: []) => {
        if (isOver()) throw new Error('Connection is closed.')
        await connect(...args)
      },
      info: async (...args: unknown[]) => args.length === 0 && this.#info !== undefined ? this.#info : await info(...args)
    })
    // This listener stays: ioredis writes to the console what nobody listens to.
    client.on('error', error => {
      // ioredis would go on, in the database 0 that nobody named.
      if (readOr(undefined, () => (error as { command?: { name?: unknown } }).command?.name) === 'select') client.disconnect(true)
    })
    client.on('close', () => { forgetReply(client) })
    this.#all.add(client)
    return client
  }

  #replaceAll (error: Error): void {
    const now = performance.now()
    if (now - this.#replacedAt < REPLACE_MS) return
    this.#replacedAt = now
    attempt(() => { this.#onRefusal(error) })
    // The command that was refused gets its error first.
    setImmediate(() => { this.#reconnectAll() })
  }

  #reconnectAll (): void {
    for (const client of this.#all) if (client.status === 'ready') client.disconnect(true)
  }

  /** ioredis tries again without end, and soon, because a job that cannot be stored is a 503. */
  #retryMs (times: number): number | null {
    return this.#isClosed ? null : Math.min(times * 50, 500)
  }
}

/**
 * Nobody answers on a lost connection any more. ioredis keeps its timer: ioredis 5 then ends the next connection, 5 s later, and ioredis 6 does not
 * notice until then that the next one is silent.
 */
function forgetReply (client: Client): void {
  const waiting = client as unknown as { socketTimeoutTimer?: NodeJS.Timeout | undefined }
  clearTimeout(waiting.socketTimeoutTimer)
  waiting.socketTimeoutTimer = undefined
}

/** Ends a connection. ioredis itself leaves commands that wait for a lost connection unanswered, and timers of BullMQ with them. */
function end (client: Client): void {
  client.disconnect()
  attempt(() => { (client as unknown as { flushQueue?: (error: Error) => void }).flushQueue?.(new Error('Connection is closed.')) })
}

/**
 * Replaces a connection whose server does not answer. BullMQ looks after the connections that wait for jobs by itself.
 */
export async function reconnectIfSilent (client: Client): Promise<void> {
  if (client.status === 'ready') await answered(SILENCE_MS, client.ping()).catch(() => { client.disconnect(true) })
}

/** Settles as the promise does, or rejects when the time is over. */
export async function answered<T> (milliseconds: number, promise: Promise<T>): Promise<T> {
  return await within(milliseconds, promise, () => { throw new Error(`it did not answer within ${milliseconds} ms`) })
}
