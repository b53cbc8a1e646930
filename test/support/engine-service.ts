/** A service for the tests of faults, in a process of its own that can be killed: `ENGINE`, `URL`, `PLACE`, `WORKER`. */
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import backgroundTasks, { defineTask, type TaskEngine } from '../../lib/index.js'

export type ServiceMessage =
  | { address: string }
  | { started: number, id: string, attempt: number }
  | { failed: number, attempts: number }
  | { line: { level: number, msg: string } }

const { ENGINE, URL: url = '', PLACE: place = '', WORKER } = process.env
const say = (message: ServiceMessage): void => { process.send?.(message) }

const note = defineTask({
  name: 'note',
  async handler ({ n, ms }: { n: number, ms: number }, { id, attempt }) {
    say({ started: n, id, attempt })
    await sleep(ms)
  }
})
const poison = defineTask({
  name: 'poison',
  retry: { attempts: 2 },
  handler (n: number, { id, attempt }) {
    say({ started: n, id, attempt })
    // What was said has to leave the process first.
    setTimeout(() => { process.kill(process.pid, 'SIGKILL') }, 50)
    return new Promise<void>(() => {})
  },
  onFailed (n, _error, { attempts }) { say({ failed: n, attempts }) }
})

const stream = { write: (line: string) => { say({ line: JSON.parse(line) as { level: number, msg: string } }) } }
const app = Fastify({ logger: { level: 'warn', stream } })
await app.register(backgroundTasks, { tasks: [note, poison], engine: await engine(), worker: WORKER === 'true' })
app.post<{ Params: { task: string, n: string }, Querystring: { ms?: string } }>('/:task/:n', async (request, reply) => {
  const n = Number(request.params.n)
  const { id } = request.params.task === 'poison'
    ? request.backgroundTasks.addTask(poison, n)
    : request.backgroundTasks.addTask(note, { n, ms: Number(request.query.ms ?? 0) })
  return await reply.code(202).send({ id })
})
process.once('SIGTERM', () => { void app.close().then(() => { process.disconnect() }) })
say({ address: await app.listen({ port: 0, host: '127.0.0.1' }) })

async function engine (): Promise<TaskEngine<unknown>> {
  if (ENGINE === 'bullmq') return (await import('../../lib/engines/bullmq.js')).bullmq({ connection: url, prefix: place })
  return (await import('../../lib/engines/pg-boss.js')).pgBoss({ connectionString: url, schema: place })
}
