import { attempt } from '../foreign.js'
import type { BackgroundTask } from '../tasks/background-task.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import { bindingsOf } from '../runner/ledger.js'
import type { Runner } from '../runner/runner.js'
import { jobOf } from '../definitions/defined-task.js'
import type { TaskList } from '../tasks/task-list.js'
import type { EngineLink } from './engine-link.js'

/** Brings the tasks of definitions to the engine: those of a request before its reply goes out, others at once. */
export class Dispatch {
  readonly link: EngineLink
  readonly #runner: Runner
  readonly #fallsBack: boolean

  /** @param fallsBack whether what cannot be stored runs here */
  constructor (runner: Runner, link: EngineLink, fallsBack: boolean) {
    this.#runner = runner
    this.link = link
    this.#fallsBack = fallsBack
  }

  added (list: TaskList, task: BackgroundTask): void {
    if (list.toStore !== undefined) list.toStore.push(task)
    // The failure is logged with the task.
    else this.#store(list, [task], list.exchange?.outcome ?? list.exchange?.currentOutcome()).catch(() => {})
  }

  /**
   * Stores what the list has gathered, if anything; from now on its tasks are stored at once.
   * @param outcome decides which of them are stored
   * @throws FST_BGT_ENGINE_UNAVAILABLE
   */
  flush (list: TaskList, outcome: ExchangeOutcome | undefined): Promise<void> | undefined {
    const tasks = list.toStore
    list.toStore = undefined
    return tasks === undefined || tasks.length === 0 ? undefined : this.#store(list, tasks, outcome)
  }

  async #store (list: TaskList, tasks: readonly BackgroundTask[], outcome: ExchangeOutcome | undefined): Promise<void> {
    // One may have been cancelled.
    const wanted = tasks.filter(task => task.state === 'pending' && this.#runner.holds(list, task, outcome))
    if (wanted.length === 0) return
    // They are on the list until they are stored or have failed: what happens to them meanwhile is the drain.
    try {
      await this.link.enqueue(wanted.map(task => jobOf(task).toStored()))
    } catch (error) {
      const left = wanted.filter(task => task.state === 'pending')
      if (this.#fallsBack) {
        for (const task of left) this.#runHere(list, task, error)
        return
      }
      for (const task of left) this.#runner.notStored(list, task, error)
      throw error
    }
    for (const task of wanted) {
      if (task.state === 'pending') this.#runner.enqueued(list, task)
    }
  }

  #runHere (list: TaskList, task: BackgroundTask, err: unknown): void {
    attempt(() => { list.log.warn({ err, task: bindingsOf(task) }, 'background task could not be stored: it runs here') })
    this.#runner.jobs.history.add(task)
    list.comeBack(task)
  }
}
