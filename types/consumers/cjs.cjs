'use strict'

// A CommonJS module in JavaScript that uses the built package.
const Fastify = require('fastify')
const backgroundTasks = require('fastify-background-tasks')
const { addTask } = require('fastify-background-tasks/ambient')
const taskRoutes = require('fastify-background-tasks/routes')
const { recordTasks } = require('fastify-background-tasks/testing')
const { BackgroundTask, backgroundTasks: named, default: byDefault, fastifyBackgroundTasks } = require('fastify-background-tasks')

exports.plugins = [backgroundTasks, named, byDefault, fastifyBackgroundTasks]
exports.routes = [taskRoutes, taskRoutes.default, taskRoutes.taskRoutes]
exports.names = Object.keys(backgroundTasks)
exports.BackgroundTask = BackgroundTask

exports.makeTask = function makeTask () {
  return new BackgroundTask(String, 'Ann')
}

exports.addHere = addTask

/** Adds the task to a request of an app that registered the plugin of this module. */
exports.serve = async function serve (task) {
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
