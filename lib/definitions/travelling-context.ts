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
   * @param isWanted whether the call is still to be made: a timeout, a cancel or the shutdown may have come first
   */
  around (text: string, call: () => unknown, isWanted: () => boolean): unknown {
    let made: Made | undefined
    let isOver = false
    const ended = (): unknown => {
      isOver = true
      if (made === undefined && !isWanted()) return undefined
      if (made === undefined) throw new Error('the option "context.restore" has to call run: it ended without that')
      return answer(made)
    }
    const failed = (error: unknown): unknown => {
      isOver = true
      const running = made !== undefined && 'result' in made ? promiseOf(made.result) : undefined
      if (running === undefined) throw error
      // The next attempt must not start while this one runs.
      const rethrow = (): never => { throw error }
      return running.then(rethrow, rethrow)
    }
    const run = (): unknown => {
      // An attempt that has ended is not made any more.
      if (made === undefined && (isOver || !isWanted())) return undefined
      // A second call is given what the first one had: an attempt is made once.
      made ??= make(call)
      return answer(made)
    }
    let waits: Promise<unknown> | undefined
    try {
      waits = promiseOf(this.#options.restore(JSON.parse(text) as never, run))
    } catch (error) {
      return failed(error)
    }
    return waits === undefined ? ended() : waits.then(ended, failed)
  }

  /** @throws FST_BGT_INVALID_PAYLOAD if `capture` throws, or what it returns is not JSON */
  #read (name: string, request: FastifyRequest): { readonly value: unknown, readonly text: string | undefined } {
    let value: unknown
    try {
      value = this.#options.capture(request)
    } catch (error) {
      throw invalid(name, 'cannot be captured: the option "context.capture" threw', error)
    }
    let isPromise: boolean
    let text: string | undefined
    try {
      isPromise = isThenable(value)
      text = isPromise ? undefined : JSON.stringify(value)
    } catch (error) {
      throw invalid(name, 'is not JSON', error)
    }
    if (isPromise) throw invalid(name, 'is a promise: the option "context.capture" is called synchronously')
    return { value, text }
  }
}

/** What a call returned or threw. */
type Made = { readonly result: unknown } | { readonly error: unknown }

function make (call: () => unknown): Made {
  try {
    const result = call()
    // `restore` and the attempt both wait for the result, and a thenable may start its work with each call of `then`.
    const promise = promiseOf(result)
    // The attempt waits for the promise when `restore` has ended, which may be after the promise has rejected.
    promise?.catch(() => {})
    return { result: promise ?? result }
  } catch (error) {
    return { error }
  }
}

function answer (made: Made): unknown {
  if ('error' in made) throw made.error
  return made.result
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
