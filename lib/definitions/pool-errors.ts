import type { FastifyBaseLogger } from 'fastify'
import { attempt } from '../foreign.js'

/** What a pool that is an event emitter has. */
interface Emitter {
  readonly on?: unknown
  readonly off?: unknown
}

const pools = new WeakMap<object, PoolErrors>()

/**
 * The errors that a pool of threads emits, such as that of a file which throws after its task has ended. An `error` event that nobody
 * listens to ends the process. A pool has one listener for all its apps, because Node warns of the eleventh.
 */
class PoolErrors {
  readonly #pool: Emitter
  /** The logs of the apps. An app that has registered the plugin for several children is there several times. */
  readonly #logs: FastifyBaseLogger[] = []

  constructor (pool: Emitter) {
    this.#pool = pool
  }

  add (log: FastifyBaseLogger): () => void {
    if (this.#logs.push(log) === 1) this.#call('on')
    return () => {
      this.#logs.splice(this.#logs.indexOf(log), 1)
      if (this.#logs.length === 0) this.#call('off')
    }
  }

  #call (method: keyof Emitter): void {
    attempt(() => {
      const fn = this.#pool[method]
      if (typeof fn === 'function') Reflect.apply(fn, this.#pool, ['error', this.#onError])
    })
  }

  readonly #onError = (err: unknown): void => {
    for (const log of new Set(this.#logs)) {
      attempt(() => { log.error({ err }, 'a thread failed while it ran no background task: a file may have thrown after its task had ended') })
    }
  }
}

/**
 * Logs the errors of a pool that is an event emitter.
 * @returns ends the logging
 */
export function logErrorsOf (pool: object, log: FastifyBaseLogger): () => void {
  const errors = pools.get(pool) ?? new PoolErrors(pool)
  pools.set(pool, errors)
  return errors.add(log)
}
