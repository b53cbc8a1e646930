import type { ExchangeOutcome } from '../exchange/outcome.js'
import { isThenable } from '../foreign.js'
import type { BackgroundTask } from '../tasks/background-task.js'
import type { TaskList } from '../tasks/task-list.js'
import type { TaskCondition } from '../tasks/task-options.js'

/** Decides which tasks run for an outcome. */
export class Conditions {
  /** The option `when` of `register`. */
  readonly #own: TaskCondition | undefined
  readonly #default: TaskCondition

  constructor (when: TaskCondition | undefined) {
    this.#own = when
    this.#default = when ?? 'success'
  }

  /** Why a task does not run for this outcome, or undefined if it does. Throws what its `when` throws. */
  reasonToSkip (list: TaskList, task: BackgroundTask, outcome: ExchangeOutcome | undefined): string | undefined {
    if (list.isStopped) return 'a task before it failed, and stopOnError is set'
    if (outcome === undefined) return undefined
    const when = this.of(task)
    if (when === 'always') return undefined
    if (when === 'success') return outcome.failed ? 'the exchange failed, and its `when` is \'success\'' : undefined
    if (when === 'error') return outcome.failed ? undefined : 'the exchange did not fail, and its `when` is \'error\''
    const answer: unknown = when(outcome)
    if (isThenable(answer)) throw new Error(`the \`when\` of the background task "${task.name}" returned a promise: it is asked synchronously`)
    if (task.state !== 'pending') return 'its `when` cancelled it'
    return answer ? undefined : 'its `when` returned false'
  }

  /** The condition of a task. The nearest `when` decides. Without any, a task that was added while a failure was handled always runs. */
  of ({ options }: BackgroundTask): TaskCondition {
    if (options === undefined) return this.#default
    return options.when ?? (options.isForFailure === true && this.#own === undefined ? 'always' : this.#default)
  }
}
