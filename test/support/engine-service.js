/**
 * A service for the tests of faults, in a process of its own that can be killed: `ENGINE`, `OPTIONS` (JSON), `WORKER`. Plain
 * JavaScript with the built package, for it is started again and again.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import backgroundTasks, { defineTask } from 'fastify-background-tasks'

const { ENGINE, OPTIONS = '', WORKER } = process.env
const say = message => { process.send(message) }

const note = defineTask({
  name: 'note',
  async handler ({ n, ms }, { id, attempt }) {
    say({ started: n, id, attempt })
    await sleep(ms)
  }
})
const poison = defineTask({
  name: 'poison',
  retry: { attempts: 2 },
  handler (n, { id, attempt }) {
    say({ started: n, id, attempt })
    // What was said has to leave the process first.
    setTimeout(() => { process.kill(process.pid, 'SIGKILL') }, 50)
    return new Promise(() => {})
  },
  onFailed (n, _error, { attempts }) { say({ failed: n, attempts }) }
})

const stream = { write: line => { say({ line: JSON.parse(line) }) } }
const app = Fastify({ logger: { level: 'warn', stream } })
await app.register(backgroundTasks, { tasks: [note, poison], engine: await engine(), worker: WORKER === 'true' })
app.post('/:task/:n', async (request, reply) => {
  const n = Number(request.params.n)
  const { id } = request.params.task === 'poison'
    ? request.backgroundTasks.addTask(poison, n)
    : request.backgroundTasks.addTask(note, { n, ms: Number(request.query.ms ?? 0) })
  return await reply.code(202).send({ id })
})
process.once('SIGTERM', () => { void app.close().then(() => { process.disconnect() }) })
say({ address: await app.listen({ port: 0, host: '127.0.0.1' }) })

async function engine () {
  const options = JSON.parse(OPTIONS)
  if (ENGINE === 'bullmq') return (await import('fastify-background-tasks/bullmq')).bullmq(options)
  if (ENGINE === 'rabbitmq') return (await import('fastify-background-tasks/rabbitmq')).rabbitmq(options)
  return (await import('fastify-background-tasks/pg-boss')).pgBoss(options)
}
