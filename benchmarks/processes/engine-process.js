// @ts-check
/**
 * One side of a comparison of engines: `node engine-process.js <engine> <way> <role> <place>`. `way` is `plugin`, or what one
 * writes with the library alone: `library`, and of pg-boss `notify` (its queue tells workers of jobs, as the plugin's does) and `best`
 * (at its best documented settings). `role` is `web` (serves a route that adds one task), `worker` (runs them) or `latency`
 * (both). The process says its port, or null, and answers `cpu` (microseconds), `ran`, `fill <n>`, `drain` (starts running what is there)
 * and `latency <n>` (milliseconds from stored to started).
 */
import { randomUUID } from 'node:crypto'
import { connect } from 'amqplib'
import Fastify from 'fastify'
import { Queue, Worker } from 'bullmq'
import { PgBoss } from 'pg-boss'
import backgroundTasks, { defineTask } from 'fastify-background-tasks'
import { bullmq } from 'fastify-background-tasks/bullmq'
import { pgBoss } from 'fastify-background-tasks/pg-boss'
import { rabbitmq } from 'fastify-background-tasks/rabbitmq'

const [engine, way, role, place] = process.argv.slice(2)
const { REDIS_URL = 'redis://127.0.0.1:6379', POSTGRES_URL = 'postgres://postgres@127.0.0.1:5432/test', RABBITMQ_URL = 'amqp://guest:guest@127.0.0.1:5672' } = process.env
const isWorker = role !== 'web'
const CONCURRENCY = 50
const PAYLOAD = { to: 'ada@example.com', subject: 'Your order', text: 'x'.repeat(150) }
let ran = 0
/** @type {(value?: unknown) => void} */
let onRun = () => {}

function work (_payload) {
  ran++
  onRun()
}

const app = Fastify()
/** Stores one task. */
let add
/** Stores many. */
let fill
/** Starts running them. */
let drain

const ways = {
  async plugin () {
    const task = defineTask({ name: 'bench', handler: work })
    const engines = {
      bullmq: () => bullmq({ connection: REDIS_URL, prefix: place }),
      'pg-boss': () => pgBoss({ connectionString: POSTGRES_URL, schema: place }),
      rabbitmq: () => rabbitmq({ url: RABBITMQ_URL, prefix: place })
    }
    await app.register(backgroundTasks, { tasks: [task], engine: engines[engine](), worker: isWorker && { concurrency: CONCURRENCY }, enqueueTimeout: 10_000 })
    app.get('/', async request => {
      request.backgroundTasks.addTask(task, PAYLOAD)
      return { hello: 'world' }
    })
    add = () => app.backgroundTasks.enqueue(task, PAYLOAD)
    fill = async n => {
      for (let i = 0; i < n; i += 500) await Promise.all(Array.from({ length: Math.min(500, n - i) }, add))
    }
    drain = () => app.ready()
    // Consuming begins with it. The connection is there before, as it is with the library alone: it is made for one job more.
    if (role === 'worker') await add()
    else await app.ready()
  },

  async library () {
    if (engine === 'bullmq') {
      const queue = new Queue('bench', { connection: { url: REDIS_URL }, prefix: place })
      const options = () => ({ jobId: randomUUID(), removeOnComplete: { age: 3600 }, removeOnFail: { age: 604800 } })
      add = () => queue.add('bench', PAYLOAD, options())
      fill = async n => {
        for (let i = 0; i < n; i += 500) await queue.addBulk(Array.from({ length: Math.min(500, n - i) }, () => ({ name: 'bench', data: PAYLOAD, opts: options() })))
      }
      drain = async () => new Worker('bench', async () => work(), { connection: { url: REDIS_URL }, prefix: place, concurrency: CONCURRENCY })
    } else if (engine === 'rabbitmq') {
      const queue = `${place}.bench`
      const connection = await connect(RABBITMQ_URL)
      const publisher = await connection.createConfirmChannel()
      publisher.on('return', () => { throw new Error('no such queue') })
      await publisher.assertQueue(queue, { durable: true, arguments: { 'x-queue-type': 'quorum' } })
      const options = () => ({ persistent: true, mandatory: true, contentType: 'application/json', messageId: randomUUID() })
      add = () => new Promise((resolve, reject) => {
        publisher.sendToQueue(queue, Buffer.from(JSON.stringify(PAYLOAD)), options(), error => { if (error) reject(error); else resolve() })
      })
      fill = async n => {
        for (let i = 0; i < n; i += 500) await Promise.all(Array.from({ length: Math.min(500, n - i) }, add))
      }
      drain = async () => {
        const channel = await (await connect(RABBITMQ_URL)).createChannel()
        await channel.prefetch(CONCURRENCY)
        await channel.consume(queue, async message => {
          await work(JSON.parse(message.content.toString()))
          channel.ack(message)
        })
      }
    } else {
      const boss = new PgBoss({ connectionString: POSTGRES_URL, schema: place })
      boss.on('error', error => { console.error(error.message) })
      await boss.start()
      await boss.createQueue('bench', way === 'notify' || role === 'latency' ? { notify: true } : {})
      add = () => boss.send('bench', PAYLOAD)
      fill = async n => {
        for (let i = 0; i < n; i += 500) await boss.insert('bench', Array.from({ length: Math.min(500, n - i) }, () => ({ data: PAYLOAD })))
      }
      // For jobs that do nothing: a batch fails as one, and ends with its slowest job.
      const best = { batchSize: 1_000, localConcurrency: 2, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true }
      drain = () => boss.work('bench', way === 'best' ? best : {}, async jobs => { for (let i = 0; i < jobs.length; i++) work() })
    }
    app.get('/', async () => {
      await add()
      return { hello: 'world' }
    })
    if (role === 'latency') await drain()
  }
}
ways.notify = ways.best = ways.library

const answers = {
  cpu () {
    const { user, system } = process.cpuUsage()
    return user + system
  },
  ran: () => ran,
  fill: n => fill(Number(n)),
  drain: async () => { await drain() },
  async latency (n) {
    const waits = []
    for (let i = 0; i < Number(n); i++) {
      const started = new Promise(resolve => { onRun = resolve })
      await add()
      const from = performance.now()
      await started
      waits.push(performance.now() - from)
      await new Promise(resolve => { setTimeout(resolve, 5) })
    }
    return waits
  }
}

await ways[way]()
if (role === 'web') await app.listen({ port: 0, host: '127.0.0.1' })
process.on('message', async (/** @type {string} */ question) => {
  const [name, argument] = question.split(' ')
  process.send((await answers[name](argument)) ?? null)
})
process.send(role === 'web' ? /** @type {import('node:net').AddressInfo} */ (app.server.address()).port : null)
