import { attempt, promiseOf } from '../foreign.js'
import { Limited } from '../limits.js'
import type { BackgroundTask } from '../tasks/background-task.js'
import type { TaskList } from '../tasks/task-list.js'
import type { RunnerOptions } from './runner-options.js'

/** Milliseconds for which a list waits for an `onError` or an `onFailed`, if the task has no timeout. */
const REPORT_MS = 30_000

/** Reports that a task has failed: in the log, to `onError`, and to the definition's `onFailed`. None of them can stop the list. */
export class Reports {
  readonly #onError: RunnerOptions['onError']

  constructor (onError: RunnerOptions['onError']) {
    this.#onError = onError
  }

  /**
   * Reports a failure.
   * @param timeout milliseconds for which the list waits, for `onError` and then for `onFailed`; by default 30 s
   * @param onFailed calls the definition's `onFailed`
   * @returns what the list waits for
   */
  failed (list: TaskList, task: BackgroundTask, error: unknown, timeout = REPORT_MS, onFailed?: () => unknown): Promise<void> | undefined {
    attempt(() => { list.log.error({ err: error, task: task.toBindings() }, 'background task failed') })
    const onError = this.#onError
    const told = onError === undefined
      ? undefined
      : this.#tell(list, task, 'onError', timeout, () => onError(error, task, list.request))
    if (onFailed === undefined) return told
    const tellLast = (): Promise<void> | undefined => this.#tell(list, task, 'onFailed', timeout, onFailed)
    return told === undefined ? tellLast() : told.then(tellLast)
  }

  #tell (list: TaskList, task: BackgroundTask, what: string, timeout: number, call: () => unknown): Promise<void> | undefined {
    const failed = (err: unknown): void => {
      attempt(() => { list.log.error({ err, task: task.toBindings() }, `${what} of a background task failed`) })
    }
    try {
      const told = promiseOf(call())
      if (told === undefined) return undefined
      const noted = told.then(() => {}, failed)
      const limited = new Limited(noted, {
        timeout,
        onTimeout: () => new Error(`${what} did not finish within ${timeout} ms`)
      })
      list.watchWith(limited)
      return limited.promise.then(() => {}, failed)
    } catch (err) {
      failed(err)
      return undefined
    }
  }
}
