import type { DefinedTask } from '../definitions/defined-task.js'
import type { History } from '../definitions/history.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import { attempt } from '../foreign.js'
import type { Runner } from '../runner/runner.js'
import type { TaskList } from '../tasks/task-list.js'
import type { EngineLink } from './engine-link.js'

/** Stores the tasks of a list in the engine. If that fails, the tasks run here where the app has `fallback: 'local'`. */
export class Dispatch {
  readonly link: EngineLink
  /** Whether tasks that cannot be stored run here. */
  readonly fallsBack: boolean
  readonly #runner: Runner
  readonly #history: History

  constructor (runner: Runner, history: History, link: EngineLink, fallsBack: boolean) {
    this.#runner = runner
    this.#history = history
    this.link = link
    this.fallsBack = fallsBack
  }

  /**
   * Stores tasks of a list.
   * @param outcome decides which of the tasks are stored
   * @throws FST_BGT_ENGINE_UNAVAILABLE
   */
  async store (list: TaskList, tasks: readonly DefinedTask[], outcome: ExchangeOutcome | undefined): Promise<void> {
    // A task may have been cancelled.
    const wanted = tasks.filter(task => task.state === 'pending' && this.#runner.skipUnlessWanted(list, task, outcome))
    if (wanted.length === 0) return
    // The tasks stay on the list until they are stored or have failed, so the drain waits for them.
    try {
      await this.link.enqueue(wanted.map(task => task.toStored()))
    } catch (error) {
      const left = wanted.filter(task => task.state === 'pending')
      if (this.fallsBack) {
        for (const task of left) this.#runHere(list, task, error)
        return
      }
      for (const task of left) this.#runner.taskNotStored(list, task, error)
      throw error
    }
    for (const task of wanted) {
      if (task.state === 'pending') this.#runner.taskStored(list, task)
    }
  }

  /** Stores tasks of a list while nobody waits. A failure is logged with its task. */
  storeUnawaited (list: TaskList, tasks: readonly DefinedTask[], outcome: ExchangeOutcome | undefined): void {
    this.store(list, tasks, outcome).catch(() => {})
  }

  #runHere (list: TaskList, task: DefinedTask, err: unknown): void {
    attempt(() => { list.log.warn({ err, task: task.toBindings() }, 'background task could not be stored: it runs here') })
    this.#history.add(task)
    list.comeBack(task)
  }
}
