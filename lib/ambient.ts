/**
 * Adds background tasks to the request that is being served, from code that is not handed the request. The plugin has to be registered with
 * `ambient: true`.
 *
 * @module ambient
 */
import { currentRequest } from './current-request.js'
import type { BackgroundTasks } from './decorators/background-tasks.js'
import type { TaskAdder } from './decorators/task-adder.js'
import { FST_BGT_NO_REQUEST } from './errors.js'

/**
 * The tasks of the request that is being served: what `request.backgroundTasks` is. Undefined outside a request, in a job that an engine has
 * delivered, and in an app that was not registered with `ambient: true`.
 */
export function requestTasks (): BackgroundTasks | undefined {
  return currentRequest()?.backgroundTasks
}

/**
 * Adds a task to the request that is being served, as `request.backgroundTasks.addTask` does.
 * @throws FST_BGT_NO_REQUEST outside a request, or without `ambient: true`
 * @throws what `request.backgroundTasks.addTask` throws
 */
export const addTask: TaskAdder['addTask'] = (fn: unknown, ...args: unknown[]) => {
  const tasks = requestTasks()
  if (tasks === undefined) throw new FST_BGT_NO_REQUEST()
  return tasks.addTask(fn as () => unknown, ...args as [])
}
