import type { BackgroundTask } from '../tasks/background-task.js'
import type { TaskList } from '../tasks/task-list.js'

/** A gate that each list passes before its turn. With it, a test records tasks instead of running them. */
export interface Gate {
  /**
   * Called with a list that is ready to run.
   * @returns whether the list is kept until it is resumed
   */
  keep: (list: TaskList) => boolean
  /** Whether the task starts without waiting for its delay or its backoff. */
  skipsDelays: (task: BackgroundTask) => boolean
}
