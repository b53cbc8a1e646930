import { plainError } from '../plain-error.js'

/** What an error of pg may tell. Of a value that the server refused not even the message is safe. */
export function plainPgError (error: unknown): Error {
  if (refusesValue(error)) return plainError(error, `the server refused a value (SQLSTATE ${codeOf(error)})`)
  return isLocked(error) ? plainError(error, 'another transaction holds a lock on a job or on its queue') : plainError(error)
}

/** Whether the server refused what it was sent, so that sending it again is in vain. */
export function refusesValue (error: unknown): boolean {
  return /^(?:22|23|54)[0-9A-Z]{3}$/.test(codeOf(error))
}

/** Whether a statement has waited too long for a lock, and has done nothing. */
export function isLocked (error: unknown): boolean {
  return codeOf(error) === '55P03'
}

/** Whether the server reads only, as a standby does, and an old primary after a failover. The statement has done nothing. */
export function isReadOnly (error: unknown): boolean {
  return codeOf(error) === '25006'
}

/** Whether the connection or the server failed, and not this one statement. Errors of sockets have a code that is no SQLSTATE, or none. */
export function isOutage (error: unknown): boolean {
  const code = codeOf(error)
  return !/^[0-9A-Z]{5}$/.test(code) || /^(?:08|53|57)/.test(code) || isReadOnly(error)
}

function codeOf (error: unknown): string {
  const code: unknown = typeof error === 'object' && error !== null && 'code' in error ? error.code : undefined
  return typeof code === 'string' ? code : ''
}
