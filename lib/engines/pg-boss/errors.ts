import { plainError } from '../plain-error.js'

/** What an error of pg may tell. Of a value that the server refused not even the message is safe. */
export function plainPgError (error: unknown): Error {
  return refusesValue(error) ? plainError(error, `the server refused a value (SQLSTATE ${String(codeOf(error))})`) : plainError(error)
}

/** Whether the server refused what it was sent, so that sending it again is in vain. */
export function refusesValue (error: unknown): boolean {
  const code = codeOf(error)
  return typeof code === 'string' && /^(?:22|23|54)[0-9A-Z]{3}$/.test(code)
}

function codeOf (error: unknown): unknown {
  return typeof error === 'object' && error !== null && 'code' in error ? error.code : undefined
}
