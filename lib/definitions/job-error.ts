import { types } from 'node:util'
import type { JobError } from '../engines/engine.js'
import { typeOf } from '../errors.js'
import { readOr } from '../foreign.js'

/**
 * An error as it is stored. Anything can be thrown: an error of another realm (in jest, Node's own errors are), an error whose getters
 * throw, or no error at all.
 */
export function toJobError (error: unknown): JobError {
  const isError = readOr(false, () => error instanceof Error || types.isNativeError(error))
  if (!isError) return { name: 'Error', message: `a ${error === null ? 'null' : typeof error} was thrown` }
  const read = (key: string): unknown => readOr(undefined, () => (error as Record<string, unknown>)[key])
  const [name, message, code] = [read('name'), read('message'), read('code')]
  return {
    name: typeof name === 'string' ? name : 'Error',
    message: typeof message === 'string' ? message : `its message is ${typeOf(message)}`,
    // gRPC and HTTP clients have numbers.
    ...(typeof code === 'string' || typeof code === 'number') && { code: String(code) }
  }
}
