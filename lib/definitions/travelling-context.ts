/** A value of the request that travels with its tasks, such as its tenant. */
import type { FastifyRequest } from 'fastify'
import { FST_BGT_INVALID_PAYLOAD, typeOf } from '../errors.js'
import { isThenable, promiseOf } from '../foreign.js'

/** The option `context` of `register`. */
export interface TaskContextOptions {
  /**
   * Called, synchronously, when a request adds a task of a definition. What it returns, as JSON of at most 4,096 bytes, is stored beside the
   * task. `undefined` stores nothing.
   */
  readonly capture: (request: FastifyRequest) => unknown
  /**
   * Called around each attempt, and around `onFailed`, in whatever process they run. It has to call `run`, and to return what `run` returns.
   * @param value what `capture` returned, after a JSON round trip. Give it your type
   */
  readonly restore: (value: never, run: () => unknown) => unknown
}

/** Bytes of UTF-8. */
const MAX_BYTES = 4_096

/** Captures the value of a request, and restores it around calls. */
export class TravellingContext {
  readonly #options: TaskContextOptions

  constructor (options: TaskContextOptions) {
    this.#options = options
  }

  /**
   * The value of a request as JSON. Undefined if there is none.
   * @param name the name of the task
   * @throws FST_BGT_INVALID_PAYLOAD
   */
  capture (name: string, request: FastifyRequest): string | undefined {
    const { value, text } = this.#read(name, request)
    if (value === undefined) return undefined
    if (text === undefined) throw invalid(name, `is ${typeOf(value)}, which is not JSON`)
    const bytes = Buffer.byteLength(text)
    if (bytes > MAX_BYTES) throw invalid(name, `has ${bytes} bytes as JSON, and ${MAX_BYTES} are accepted`)
    return text
  }

  /**
   * Makes a call with the value restored.
   * @param text the value as JSON
   */
  around (text: string, call: () => unknown): unknown {
    let called: { readonly result: unknown } | undefined
    const done = (): unknown => {
      if (called === undefined) throw new Error('the option "context.restore" has to call run: it ended without that')
      return called.result
    }
    const restored: unknown = this.#options.restore(JSON.parse(text) as never, () => {
      // A second call is given the result of the first: an attempt is made once.
      called ??= { result: call() }
      return called.result
    })
    const waits = promiseOf(restored)
    return waits === undefined ? done() : waits.then(done)
  }

  /** @throws FST_BGT_INVALID_PAYLOAD if `capture` throws, or what it returns is not JSON */
  #read (name: string, request: FastifyRequest): { readonly value: unknown, readonly text: string | undefined } {
    let value: unknown
    try {
      value = this.#options.capture(request)
    } catch (error) {
      throw invalid(name, 'cannot be captured: the option "context.capture" threw', error)
    }
    if (isThenable(value)) {
      promiseOf(value)?.catch(() => {})
      throw invalid(name, 'is a promise: the option "context.capture" is called synchronously')
    }
    try {
      return { value, text: JSON.stringify(value) }
    } catch (error) {
      throw invalid(name, 'is not JSON', error)
    }
  }
}

/** Whether a stored value is one that was captured: JSON of a length that is accepted. */
export function isCaptured (text: unknown): text is string {
  if (typeof text !== 'string' || Buffer.byteLength(text) > MAX_BYTES) return false
  try {
    JSON.parse(text)
    return true
  } catch {
    return false
  }
}

function invalid (name: string, reason: string, cause?: unknown): Error {
  return new FST_BGT_INVALID_PAYLOAD(name, `is invalid: context ${reason}`, ...cause === undefined ? [] : [{ cause }])
}
