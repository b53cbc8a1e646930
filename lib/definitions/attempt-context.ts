import type { FastifyBaseLogger, FastifyInstance } from 'fastify'
import { readOr } from '../foreign.js'
import type { TaskContext } from './define-task.js'
import type { Envelope } from './envelope.js'

/** What a handler is given of the app. */
export interface Surroundings {
  readonly app: FastifyInstance
  /** The request's, or the app's. */
  readonly log: FastifyBaseLogger
}

/** A task, as far as its handler may know it. */
interface Attempted {
  readonly envelope: Envelope
  readonly attempt: number
  readonly signal: AbortSignal
}

/** The logger of a delivery has the id of the request that the job comes from, under the name that the app's own lines have for it. */
export function loggerOf ({ app, log }: Surroundings, { delivery, requestId }: Envelope): FastifyBaseLogger {
  if (delivery === undefined || requestId === undefined) return log
  return readOr(log, () => log.child({ [String(app.initialConfig.requestIdLogLabel)]: requestId }))
}

const TASK = Symbol('task')

/** What a handler is given. */
export class AttemptContext implements TaskContext {
  readonly id: string
  readonly attempt: number
  declare readonly signal: AbortSignal
  readonly log: FastifyBaseLogger
  readonly app: FastifyInstance
  readonly headers: Readonly<Record<string, string>>
  readonly requestId: string | undefined
  readonly [TASK]: Attempted

  constructor (task: Attempted, surroundings: Surroundings) {
    this.id = task.envelope.id
    this.attempt = task.attempt
    this.log = loggerOf(surroundings, task.envelope)
    this.app = surroundings.app
    this.headers = task.envelope.headers
    this.requestId = task.envelope.requestId
    this[TASK] = task
    Object.defineProperty(this, 'signal', SIGNAL)
  }
}

/**
 * Made on first read, and the context's own, for those who spread it. All contexts share one getter: of one that each has for
 * itself, in a literal, V8 keeps the shape until the next full collection, and the task with it. Measured: 1 kB and 13 µs a job.
 */
const SIGNAL = { enumerable: true, get (this: AttemptContext): AbortSignal { return this[TASK].signal } }
