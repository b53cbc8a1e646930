// @ts-check
/**
 * One of the servers to compare, all of which have the same route: `node servers.js <kind> <tasks> <logger>`. The process says its port, then
 * answers `cpu` (microseconds used so far), `ran` (tasks run so far) and `heap` (bytes in use, after a collection).
 */
import { once } from 'node:events'
import Fastify from 'fastify'
import { Type } from '@sinclair/typebox'
import { fastifyRequestContext, requestContext } from '@fastify/request-context'
import backgroundTasks, { defineTask } from 'fastify-background-tasks'
import { addTask } from 'fastify-background-tasks/ambient'
import { bullmq } from 'fastify-background-tasks/bullmq'

const [kind, tasks, logger] = process.argv.slice(2)
const count = Number(tasks)
const app = Fastify({ logger: logger === 'logger' && { level: 'info', file: '/dev/null' } })
let ran = 0

function task (by) {
  ran += by
}

function onResponse (request, reply, done) {
  done()
}

const routes = {
  /** What an app has anyway: a hook that does nothing. */
  hook () {
    app.addHook('onResponse', onResponse)
    app.get('/', async () => ({ hello: 'world' }))
  },

  /** What people write without a plugin. */
  hand () {
    app.decorateRequest('tasks', null)
    app.addHook('onRequest', async (/** @type {any} */ request) => { request.tasks = [] })
    app.addHook('onResponse', async (/** @type {any} */ request) => {
      for (const { fn, args } of request.tasks) {
        try {
          await fn(...args)
        } catch (error) {
          request.log.error(error)
        }
      }
    })
    app.get('/', async (/** @type {any} */ request) => {
      for (let i = 0; i < count; i++) request.tasks.push({ fn: task, args: [1] })
      return { hello: 'world' }
    })
  },

  /** The plugin, with a route that adds nothing. */
  async unused () {
    await app.register(backgroundTasks)
    app.get('/', async () => ({ hello: 'world' }))
  },

  async tasks () {
    await app.register(backgroundTasks)
    app.get('/', async request => {
      for (let i = 0; i < count; i++) request.backgroundTasks.addTask(task, 1)
      return { hello: 'world' }
    })
  },

  /** The same, by code that is not given the request. */
  async ambient () {
    await app.register(backgroundTasks, { ambient: true })
    app.get('/', async () => {
      for (let i = 0; i < count; i++) addTask(task, 1)
      return { hello: 'world' }
    })
  },

  /** The same app, with a route that adds nothing. */
  async 'unused-ambient' () {
    await app.register(backgroundTasks, { ambient: true })
    app.get('/', async () => ({ hello: 'world' }))
  },

  /** With an engine, whose server is not asked: the task is a function. */
  async engine () {
    const definition = defineTask({ name: 'bench', payload: Type.Object({}), handler: () => {} })
    await app.register(backgroundTasks, { tasks: [definition], engine: bullmq({ connection: process.env.REDIS_URL ?? 'redis://127.0.0.1:6379', prefix: 'fbt_bench_requests' }), worker: false })
    app.get('/', async request => {
      for (let i = 0; i < count; i++) request.backgroundTasks.addTask(task, 1)
      return { hello: 'world' }
    })
  },

  /** What people write without a plugin, in the store that @fastify/request-context keeps. */
  async context () {
    await app.register(fastifyRequestContext)
    app.addHook('onRequest', async () => { requestContext.set('tasks', []) })
    app.addHook('onResponse', async request => {
      for (const { fn, args } of requestContext.get('tasks')) {
        try {
          await fn(...args)
        } catch (error) {
          request.log.error(error)
        }
      }
    })
    app.get('/', async () => {
      for (let i = 0; i < count; i++) requestContext.get('tasks').push({ fn: task, args: [1] })
      return { hello: 'world' }
    })
  },

  /** The handler says by an interim reply that it runs, and waits for the client to disconnect. */
  async aborted () {
    await app.register(backgroundTasks)
    app.get('/', async (request, reply) => {
      request.backgroundTasks.addTask(task, 1)
      const closed = once(reply.raw, 'close')
      reply.raw.writeProcessing()
      await closed
      return { hello: 'world' }
    })
  }
}

const answers = {
  cpu () {
    const { user, system } = process.cpuUsage()
    return user + system
  },
  ran: () => ran,
  async heap () {
    await app.backgroundTasks.idle()
    for (let i = 0; i < 4; i++) {
      await new Promise(resolve => { setTimeout(resolve, 20) })
      globalThis.gc()
    }
    return process.memoryUsage().heapUsed
  }
}

await routes[kind]()
await app.listen({ port: 0, host: '127.0.0.1' })
process.on('message', async question => { process.send(await answers[question]()) })
process.send(/** @type {import('node:net').AddressInfo} */ (app.server.address()).port)
