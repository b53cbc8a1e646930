// An ES module in JavaScript that uses the built package.
import Fastify from 'fastify'
import backgroundTasks, { BackgroundTask, backgroundTasks as named, fastifyBackgroundTasks } from 'fastify-background-tasks'
import * as namespace from 'fastify-background-tasks'

export const plugins = [backgroundTasks, named, fastifyBackgroundTasks, namespace.default, namespace.backgroundTasks]
export const names = Object.keys(namespace)
export { BackgroundTask }

export function makeTask () {
  return new BackgroundTask(String, 'Ann')
}

/** Adds the task to a request of an app that registered the plugin of this module. */
export async function serve (task) {
  const app = Fastify()
  await app.register(backgroundTasks)
  app.get('/', async request => ({ state: request.backgroundTasks.addTask(task).state }))
  await app.inject('/')
  await app.backgroundTasks.idle()
  await app.close()
  return task.state
}
