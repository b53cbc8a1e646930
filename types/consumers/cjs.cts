// A CommonJS module in TypeScript that uses the built package: `require` gives the plugin, and everything else is on it.
import Fastify = require('fastify')
import backgroundTasks = require('fastify-background-tasks')
import { addTask } from 'fastify-background-tasks/ambient'
import taskRoutes = require('fastify-background-tasks/routes')
import { recordTasks } from 'fastify-background-tasks/testing'

export type Everything = [
  backgroundTasks.AppBackgroundTasks, backgroundTasks.BackgroundTasks, backgroundTasks.ExchangeOutcome,
  backgroundTasks.FastifyBackgroundTasksOptions, backgroundTasks.IdleOptions, backgroundTasks.TaskAbandonedMessage,
  backgroundTasks.TaskAddedMessage, backgroundTasks.TaskAdder, backgroundTasks.TaskCondition, backgroundTasks.TaskFunction,
  backgroundTasks.TaskOptions, backgroundTasks.TaskRunMessage, backgroundTasks.TaskSkippedMessage, backgroundTasks.TaskState,
  backgroundTasks.TaskStats
]

export const plugins = [
  backgroundTasks, backgroundTasks.default, backgroundTasks.backgroundTasks, backgroundTasks.fastifyBackgroundTasks
]
export const routes = [taskRoutes, taskRoutes.default, taskRoutes.taskRoutes]
export import BackgroundTask = backgroundTasks.BackgroundTask

export function greet (name: string, times = 1): string {
  return name.repeat(times)
}

export function makeTask (): backgroundTasks.BackgroundTask {
  return new backgroundTasks.BackgroundTask(greet, 'Ann', 2)
}

export function refused (tasks: backgroundTasks.BackgroundTasks): void {
  // @ts-expect-error a name is no number
  tasks.addTask(greet, 1)
}

export const addHere = addTask

/** Adds the task to a request of an app that registered the plugin of this module. */
export async function serve (task: backgroundTasks.BackgroundTask): Promise<backgroundTasks.TaskState> {
  const options: backgroundTasks.FastifyBackgroundTasksOptions = { when: 'always', timeout: undefined }
  const app = Fastify()
  await app.register(backgroundTasks, options)
  const operator: taskRoutes.TaskRoutesOptions = { public: true }
  await app.register(taskRoutes, { prefix: '/tasks', ...operator })
  app.get('/', async request => {
    const tasks: backgroundTasks.BackgroundTasks = request.backgroundTasks
    tasks.addTask(greet, 'Ann')
    return { state: tasks.addTask(task).state }
  })
  const tasks = recordTasks(app)
  await app.inject('/')
  await tasks.run()
  await app.close()
  return task.state
}
