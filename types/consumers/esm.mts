// An ES module that uses the built package: all types, and each value under each of its names.
import Fastify from 'fastify'
import taskRoutes, { taskRoutes as namedRoutes, type TaskRoutesOptions } from 'fastify-background-tasks/routes'
import { recordTasks } from 'fastify-background-tasks/testing'
import backgroundTasks, { BackgroundTask, backgroundTasks as named, fastifyBackgroundTasks } from 'fastify-background-tasks'
import type {
  AppBackgroundTasks, BackgroundTasks, ExchangeOutcome, FastifyBackgroundTasksOptions, IdleOptions, TaskAbandonedMessage,
  TaskAddedMessage, TaskAdder, TaskCondition, TaskFunction, TaskOptions, TaskRunMessage, TaskSkippedMessage, TaskState, TaskStats
} from 'fastify-background-tasks'

export type Everything = [
  AppBackgroundTasks, BackgroundTasks, ExchangeOutcome, FastifyBackgroundTasksOptions, IdleOptions, TaskAbandonedMessage,
  TaskAddedMessage, TaskAdder, TaskCondition, TaskFunction, TaskOptions, TaskRunMessage, TaskSkippedMessage, TaskState, TaskStats
]

export const plugins = [backgroundTasks, named, fastifyBackgroundTasks]
export const routes = [taskRoutes, namedRoutes]
export { BackgroundTask }

export function greet (name: string, times = 1): string {
  return name.repeat(times)
}

export function makeTask (): BackgroundTask {
  return new BackgroundTask(greet, 'Ann', 2)
}

export function refused (tasks: BackgroundTasks): void {
  // @ts-expect-error a name is no number
  tasks.addTask(greet, 1)
}

/** Adds the task to a request of an app that registered the plugin of this module. */
export async function serve (task: BackgroundTask): Promise<TaskState> {
  const options: FastifyBackgroundTasksOptions = { when: 'always', timeout: undefined }
  const app = Fastify()
  await app.register(backgroundTasks, options)
  const operator: TaskRoutesOptions = { public: true }
  await app.register(taskRoutes, { prefix: '/tasks', ...operator })
  app.get('/', async request => {
    const tasks: BackgroundTasks = request.backgroundTasks
    tasks.addTask(greet, 'Ann')
    tasks.with({ name: 'greeting' }).addTask(greet, 'Ann', 3)
    return { state: tasks.addTask(task).state }
  })
  const tasks = recordTasks(app)
  await app.inject('/')
  await tasks.run()
  await app.backgroundTasks.idle({ rejectOnFailure: false })
  const { failed }: TaskStats = app.backgroundTasks.stats
  await app.close()
  return failed === 0 ? task.state : 'failed'
}
