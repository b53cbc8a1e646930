/** Definitions whose worker has no connection, while other connections work. */
import type { FastifyBaseLogger } from 'fastify'
import { attempt } from '../../foreign.js'
import type { Client, Connections } from './connection.js'
import { whyRefused } from './server.js'

/** Milliseconds between two looks. */
const LOOK_MS = 2000

/**
 * A server has a quota of connections (`maxclients`, or the plan of a host). It closes each connection above it, and ioredis does not learn
 * why. The jobs of some definitions then wait, so the log names these definitions, once.
 */
export class UnservedTasks {
  readonly #consumer: Client
  readonly #connections: Connections
  readonly #log: FastifyBaseLogger
  readonly #timer: NodeJS.Timeout
  #last = new Set<string>()
  #isTold = false

  constructor (consumer: Client, connections: Connections, log: FastifyBaseLogger) {
    this.#consumer = consumer
    this.#connections = connections
    this.#log = log
    this.#timer = setInterval(() => { void this.#look() }, LOOK_MS).unref()
  }

  stop (): void {
    clearInterval(this.#timer)
  }

  async #look (): Promise<void> {
    // While the server is away nothing is served, and the log has said so.
    const now = this.#consumer.status === 'ready' ? this.#connections.unserved() : []
    const still = now.filter(name => this.#last.has(name))
    this.#last = new Set(now)
    if (now.length === 0 && this.#isTold && this.#consumer.status === 'ready') {
      this.#isTold = false
      attempt(() => { this.#log.info('background task engine "bullmq": jobs of all definitions are taken again') })
    } else if (still.length > 0 && !this.#isTold) {
      this.#isTold = true
      const reason = await whyRefused(this.#consumer)
      const names = still.join(', ')
      attempt(() => {
        this.#log.warn(`background task engine "bullmq": Redis takes no further connection (${reason}), so this process takes no jobs of ${names}. It goes on trying`)
      })
    }
  }
}
