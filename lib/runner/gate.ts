import type { BackgroundTask } from '../tasks/background-task.js'
import type { TaskList } from '../tasks/task-list.js'

/** What stands before the turns of lists: a test records tasks in place of running them. */
export interface Gate {
  /** A list is ready to run. @returns whether it is kept until it is resumed */
  keep: (list: TaskList) => boolean
  /** Whether the task waits for no delay and no backoff. */
  skipsDelays: (task: BackgroundTask) => boolean
}
