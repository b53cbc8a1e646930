import type { FastifyRequest } from 'fastify'
import type { BackgroundTask } from '../tasks/background-task.js'
import type { TaskCondition } from '../tasks/task-options.js'

/** Options of `register` for whoever runs tasks, with their defaults. */
export interface RunnerOptions {
  /** Undefined: the default, `'success'`, which does not skip what is added while a failure is handled. */
  readonly when: TaskCondition | undefined
  readonly stopOnError: boolean
  readonly onError: ((error: unknown, task: BackgroundTask, request: FastifyRequest | undefined) => void | Promise<void>) | undefined
  readonly concurrency: number
  readonly maxPending: number
  readonly timeout: number | undefined
  readonly slowTask: number | undefined
}
