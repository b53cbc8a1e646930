/**
 * Errors of the libraries that speak to servers, without what must not reach a log: ioredis adds the command with its arguments, and pg
 * adds the statement with its values. Payloads are among both.
 */
import { readOr } from '../foreign.js'

/**
 * An error that has the message and the code of what a library rejected with, and nothing else.
 * @param message the message, where that of the library may quote a value
 */
export function plainError (error: unknown, message = messageOf(error)): Error {
  const code = readOr(undefined, () => fieldsOf(error).code)
  return Object.assign(new Error(message), typeof code === 'string' && { code })
}

/** The message of an error. Node tries several addresses of one host, and makes one error without a message of what went wrong at each. */
export function messageOf (error: unknown): string {
  return readOr('an error that cannot be read', () => {
    const { message, code, errors } = fieldsOf(error)
    const first: unknown = Array.isArray(errors) ? errors[0] : undefined
    return String(message || fieldsOf(first).message || code || error)
  })
}

function fieldsOf (error: unknown): { readonly message?: unknown, readonly code?: unknown, readonly errors?: unknown } {
  return typeof error === 'object' && error !== null ? error : {}
}
