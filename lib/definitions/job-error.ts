import { types } from 'node:util'
import type { JobError } from '../engines/engine.js'
import { readOr } from '../foreign.js'

/**
 * An error as it is stored. Anything can be thrown: an error of another realm (in jest, Node's own errors are), an error whose getters
 * throw, or no error at all.
 */
export function toJobError (error: unknown): JobError {
  const isError = readOr(false, () => error instanceof Error || types.isNativeError(error))
  if (!isError) return { name: 'Error', message: `a ${error === null ? 'null' : typeof error} was thrown` }
  const read = (key: string): string | undefined => readOr(undefined, () => {
    const value: unknown = (error as Record<string, unknown>)[key]
    return typeof value === 'string' ? value : undefined
  })
  const code = read('code')
  return { name: read('name') ?? 'Error', message: read('message') ?? '', ...code !== undefined && { code } }
}
