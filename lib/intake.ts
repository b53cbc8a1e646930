/** What `addTask` is given becomes a task. */
import { BackgroundTask, invalidTask } from './background-task.js'
import { isInstance } from './foreign.js'
import type { RunOptions, TaskOptions } from './options.js'
import type { TaskFunction } from './task-adder.js'

/** What is added while a failure is handled is added for it. */
export function forFailure (options: TaskOptions | undefined): RunOptions {
  return { ...options, isForFailure: true }
}

export function toTask (where: string, fn: unknown, args: unknown[]): BackgroundTask {
  try {
    if (typeof fn === 'function') return BackgroundTask.of(fn as TaskFunction, args)
  } catch {
    throw invalidTask(where, fn, true)
  }
  if (isInstance(fn, BackgroundTask) && args.length === 0) return fn
  throw invalidTask(where, fn, true)
}
