/** The request that is being served, for code that is not handed it (`ambient: true`). */
import { AsyncLocalStorage } from 'node:async_hooks'
import type { FastifyRequest } from 'fastify'

// One for all copies of the plugin in the process would mix up apps, so each copy of this package has its own.
const storage = new AsyncLocalStorage<FastifyRequest | undefined>()

export function currentRequest (): FastifyRequest | undefined {
  return storage.getStore()
}

export function isPartOf (request: FastifyRequest): boolean {
  return storage.getStore() === request
}

/** Calls a function as part of a request, or of none. What the function starts is part of it, too. */
export function asPartOf<Args extends unknown[], Result> (request: FastifyRequest | undefined, fn: (...args: Args) => Result, ...args: Args): Result {
  return storage.getStore() === request ? fn(...args) : storage.run(request, fn, ...args)
}
