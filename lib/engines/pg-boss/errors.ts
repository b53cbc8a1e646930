import { plainError } from '../plain-error.js'

/** What an error of pg may tell. Of a value that the server refused not even the message is safe. */
export function plainPgError (error: unknown): Error {
  if (isQueueGone(error)) return Object.assign(new Error('the queue of a definition does not exist'), { code: '23503' })
  if (refusesValue(error)) return plainError(error, `the server refused a value (SQLSTATE ${codeOf(error)})`)
  // The server names the statement, which would make a warning of each.
  if (isReadOnly(error)) return plainError(error, 'the server is read-only, as a standby is, and an old primary after a failover')
  return isLocked(error) ? plainError(error, 'another transaction holds a lock on a job or on its queue') : plainError(error)
}

/** Whether the server refused what it was sent, so that sending it again is in vain. */
export function refusesValue (error: unknown): boolean {
  return /^(?:22|23|54)[0-9A-Z]{3}$/.test(codeOf(error))
}

/** Whether a value can never be stored, because the server has no form for it or it is too large. */
export function isUnstorable (error: unknown): boolean {
  return /^(?:22|54)[0-9A-Z]{3}$/.test(codeOf(error))
}

/** Whether the queue is gone, because somebody has deleted it, or restored an older database. pg-boss wraps the error of the server. */
export function isQueueGone (error: unknown): boolean {
  const cause: unknown = typeof error === 'object' && error !== null && 'cause' in error ? error.cause : undefined
  return codeOf(error) === '23503' || codeOf(cause) === '23503'
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
