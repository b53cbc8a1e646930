/** What `addTask` is given becomes a task. */
import { BackgroundTask, invalidTask } from '../tasks/background-task.js'
import { isInstance } from '../foreign.js'
import type { LastFunction } from '../tasks/last-function.js'
import type { RunOptions, TaskOptions } from '../options.js'
import type { TaskFunction } from './task-adder.js'

/** What is added while a failure is handled is added for it. */
export function forFailure (options: TaskOptions | undefined): RunOptions {
  return { ...options, isForFailure: true }
}

/** @throws FST_BGT_INVALID_TASK */
export function toTask (fn: unknown, args: unknown[], last: LastFunction): BackgroundTask {
  if (typeof fn === 'function' && !last.isGenerator(fn as TaskFunction)) return BackgroundTask.of(fn as TaskFunction, args)
  if (isInstance(fn, BackgroundTask) && args.length === 0) return fn
  throw invalidTask('addTask', fn, true)
}
