/**
 * Cleanups that run after the drain. They may add no further cleanup, because a cleanup that adds itself again would never end, and no
 * deadline follows.
 */
import { AsyncLocalStorage } from 'node:async_hooks'
import type { BackgroundTask } from '../tasks/background-task.js'
import type { TaskList } from '../tasks/task-list.js'

const running = new AsyncLocalStorage<TaskList>()

export function startLateCleanup (list: TaskList, cleanup: BackgroundTask): unknown {
  return cleanup.start(call => running.run(list, call))
}

/** Whether a late cleanup of the list makes the current call. */
export function isInLateCleanup (list: TaskList): boolean {
  return running.getStore() === list
}
