// An ES module in JavaScript that uses the built package.
import Fastify from 'fastify'
import backgroundTasks, { BackgroundTask, backgroundTasks as named, fastifyBackgroundTasks } from 'fastify-background-tasks'
import * as namespace from 'fastify-background-tasks'
import { addTask } from 'fastify-background-tasks/ambient'
import taskRoutes, { taskRoutes as namedRoutes } from 'fastify-background-tasks/routes'
import { recordTasks } from 'fastify-background-tasks/testing'

export const plugins = [backgroundTasks, named, fastifyBackgroundTasks, namespace.default, namespace.backgroundTasks]
export const routes = [taskRoutes, namedRoutes]
export const names = Object.keys(namespace)
export { BackgroundTask }

export function makeTask () {
  return new BackgroundTask(String, 'Ann')
}

export const addHere = addTask

/** Adds the task to a request of an app that registered the plugin of this module. */
export async function serve (task) {
  const app = Fastify()
  await app.register(backgroundTasks)
  await app.register(taskRoutes, { prefix: '/tasks', public: true })
  app.get('/', async request => ({ state: request.backgroundTasks.addTask(task).state }))
  const tasks = recordTasks(app)
  await app.inject('/')
  await tasks.run()
  await app.close()
  return task.state
}
