/** A service for shutdown.test.ts, run with tap's own loader so that coverage adds up: `never` adds a task that nothing will ever settle, with a closeTimeout of ten minutes. */
import { setTimeout as sleep } from 'node:timers/promises'
import closeWithGrace from 'close-with-grace'
import Fastify from 'fastify'
import backgroundTasks from '../../lib/index.js'

const never = process.argv[2] === 'never'
const app = Fastify({ logger: { level: 'error' } })
let databaseIsOpen = true

app.addHook('onClose', async () => {
  databaseIsOpen = false
  console.log('database closed')
})
await app.register(backgroundTasks, never ? { closeTimeout: 600_000 } : {})

app.get('/never', async request => {
  request.backgroundTasks.addTask(() => { console.log('unsettled ran') })
  console.log('entered')
  await new Promise(() => {})
})

app.get('/:id', async request => {
  const { id } = request.params as { id: string }
  if (never) request.backgroundTasks.addTask(async function never () { await new Promise(() => {}) })
  request.backgroundTasks.addTask(async () => {
    await sleep(300)
    if (databaseIsOpen) console.log(`done ${id}`)
  })
  return 'accepted'
})

if (never) process.once('SIGTERM', () => { void app.close() })
else closeWithGrace({ delay: 9000 }, async () => { await app.close() })
process.stdout.write(`${await app.listen({ port: 0, host: '127.0.0.1' })}\n`)
