// @ts-check
import backgroundTasks, { defineTask } from 'fastify-background-tasks'
import { bullmq } from 'fastify-background-tasks/bullmq'
import { pgBoss } from 'fastify-background-tasks/pg-boss'
import { rabbitmq } from 'fastify-background-tasks/rabbitmq'
import { CONCURRENCY, inGroups, NAMES, PAYLOAD, POSTGRES_URL, RABBITMQ_URL, REDIS_URL, SCHEMA } from './promises.js'

/** @type {import('../engine-process.js').OpenWay} */
export async function plugin ({ app, engine, place, role, work }) {
  const retry = process.env.BENCH_FAILS === undefined ? undefined : { attempts: 1 }
  const tasks = NAMES.map(name => defineTask({ name, payload: SCHEMA, handler: work, retry }))
  const [task] = tasks
  let turn = 0
  const engines = {
    bullmq: () => bullmq({ connection: REDIS_URL, prefix: place }),
    'pg-boss': () => pgBoss({ connectionString: POSTGRES_URL, schema: place }),
    rabbitmq: () => rabbitmq({ url: RABBITMQ_URL, prefix: place })
  }
  await app.register(backgroundTasks, { tasks, engine: engines[engine](), worker: role !== 'web' && { concurrency: CONCURRENCY }, enqueueTimeout: 10_000 })
  app.get('/', async request => {
    request.backgroundTasks.addTask(task, PAYLOAD)
    return { hello: 'world' }
  })
  const add = () => app.backgroundTasks.enqueue(tasks[turn++ % tasks.length], PAYLOAD)
  /** @param {number} delay */
  const delayed = (delay, payload) => app.backgroundTasks.enqueue(task, payload, { delay })
  const wait = async () => {
    const { id } = await add()
    return await app.backgroundTasks.result(task, id, { timeout: 60_000 })
  }
  const count = () => app.backgroundTasks.count(task)
  /** @param {string} [after] */
  const find = after => app.backgroundTasks.find(task, { state: 'failed', limit: 50, after })
  // Consuming begins when the app is ready. The connection is there before, as it is with the library alone: it is made for one job more.
  if (role === 'worker') await add()
  else await app.ready()
  return { add, fill: n => inGroups(n, count => Promise.all(Array.from({ length: count }, add))), drain: () => app.ready(), wait, delayed, count, find }
}
