'use strict'

// What Babel, and with it Jest, makes of
//   import backgroundTasks, { BackgroundTask } from 'fastify-background-tasks'
//   import Fastify from 'fastify'
const _fastifyBackgroundTasks = _interopRequireWildcard(require('fastify-background-tasks'))
const _fastify = _interopRequireDefault(require('fastify'))

function _interopRequireDefault (e) { return e && e.__esModule ? e : { default: e } }

function _interopRequireWildcard (e) {
  if (e && e.__esModule) return e
  if (e === null || (typeof e !== 'object' && typeof e !== 'function')) return { default: e }
  const n = { __proto__: null }
  for (const u in e) {
    if (u === 'default' || !{}.hasOwnProperty.call(e, u)) continue
    const i = Object.getOwnPropertyDescriptor(e, u)
    if (i && (i.get || i.set)) Object.defineProperty(n, u, i)
    else n[u] = e[u]
  }
  n.default = e
  return n
}

exports.plugins = [_fastifyBackgroundTasks.default, _interopRequireDefault(require('fastify-background-tasks')).default]
exports.BackgroundTask = _fastifyBackgroundTasks.BackgroundTask

exports.makeTask = function makeTask () {
  return new _fastifyBackgroundTasks.BackgroundTask(String, 'Ann')
}

/** Adds the task to a request of an app that registered the plugin of this module. */
exports.serve = async function serve (task) {
  const app = (0, _fastify.default)()
  await app.register(_fastifyBackgroundTasks.default)
  app.get('/', async request => ({ state: request.backgroundTasks.addTask(task).state }))
  await app.inject('/')
  await app.backgroundTasks.idle()
  await app.close()
  return task.state
}
