import type { FastifyRequest } from 'fastify'
import type { BackgroundTask } from '../tasks/background-task.js'
import type { TaskCondition } from '../tasks/task-options.js'

/** The options of `register` that the runner needs, with their defaults. */
export interface RunnerOptions {
  /** Undefined stands for the default, `'success'`, which does not skip a task that is added while a failure is handled. */
  readonly when: TaskCondition | undefined
  readonly stopOnError: boolean
  readonly onError: ((error: unknown, task: BackgroundTask, request: FastifyRequest | undefined) => void | Promise<void>) | undefined
  readonly concurrency: number
  readonly maxPending: number
  readonly timeout: number | undefined
  readonly slowTask: number | undefined
}
