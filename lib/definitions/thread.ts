/** Tasks that have a `file`: they run in a thread of the user's pool. */
import { typeOf } from '../errors.js'
import { readOr } from '../foreign.js'
import type { TaskContext } from './define-task.js'
import { BRIDGE } from './thread-bridge.cjs'

/** A pool of threads: what `piscina` and its like have. */
export interface ThreadPool {
  /** Calls the default export of a file in a thread. When the signal aborts, the thread ends, and the promise rejects. */
  run (task: unknown, options: { filename: string, signal: AbortSignal }): Promise<unknown>
}

/** What the bridge file resolves to. */
interface Answer {
  /** The result as JSON. */
  readonly json?: unknown
  /** Why the result is not JSON. */
  readonly refused?: unknown
  readonly error?: { readonly name: string, readonly message: string, readonly code?: string | number, readonly stack?: string }
  /** What was thrown and is no error. Anything may be thrown, `undefined`, too. */
  readonly thrown?: unknown
}

/**
 * Makes one attempt in a thread. Resolves to the result, and rejects with the error of the file.
 * @param file the URL of the task's file
 */
export async function runInThread (threads: ThreadPool, name: string, file: string, payload: unknown, { id, attempt, headers, requestId, signal }: TaskContext): Promise<unknown> {
  const task = { name, file, payload, context: { id, attempt, headers: { ...headers }, requestId } }
  const answer: unknown = await threads.run(task, { filename: BRIDGE, signal })
  const read = readOr<Answer>({}, () => ({ ...answer as Answer }))
  const { json, refused, error } = read
  if (error !== undefined) throw toError(error)
  if ('thrown' in read) throw read.thrown
  if (typeof json === 'string') return JSON.parse(json)
  if (typeof refused === 'string') return { toJSON () { throw new TypeError(refused) } }
  throw new Error(`the option "threads" has to run the file that it is given: its run resolved to ${typeOf(answer)}`)
}

function toError ({ name, message, code, stack }: NonNullable<Answer['error']>): Error {
  const error = Object.assign(new Error(message), { name }, code !== undefined && { code })
  if (stack !== undefined) error.stack = stack
  return error
}
