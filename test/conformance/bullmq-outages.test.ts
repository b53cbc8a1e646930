import { setTimeout as sleep } from 'node:timers/promises'
import { Queue } from 'bullmq'
import { Redis } from 'ioredis'
import t from 'tap'
import { bullmq, type BullMqOptions } from '../../lib/engines/bullmq/index.js'
import { defineTask } from '../../lib/index.js'
import { start } from '../support/app.js'
import { redisServer } from '../support/servers.js'
import { outages } from './outages.js'
import { opened } from '../support/opened.js'

outages('bullmq', async t => await opened(t, 'redis-server', () => redisServer()), (url, place) => bullmq({ connection: url, prefix: place }))

t.test('a full Redis: jobs are refused with its reason, and what is stored still runs', async t => {
  const server = await opened(t, 'redis-server', () => redisServer('--maxmemory', '8mb'))
  if (server === undefined) return
  t.teardown(() => server.remove())
  await server.start()
  const ran: string[] = []
  const note = defineTask({ name: 'note', handler (name: string) { ran.push(name) } })
  const { app, logs } = await start(t, { tasks: [note], engine: bullmq({ connection: server.url }) })
  const admin = new Redis(server.url)
  t.teardown(() => { admin.disconnect() })
  app.get<{ Params: { name: string } }>('/:name', async request => { request.backgroundTasks.addTask(note, request.params.name) })
  t.equal((await app.inject('/before')).statusCode, 200)
  // Full to the last byte.
  for (let size = 1 << 20; size > 16; size >>= 1) {
    while (await admin.append('ballast', Buffer.alloc(size)).then(() => true, () => false));
  }
  const reply = await app.inject('/during')
  t.equal(reply.statusCode, 503)
  t.match(reply.json(), { code: 'FST_BGT_ENGINE_UNAVAILABLE', message: /not available. Retry later$/ })
  t.match(logs.findLast(({ msg }) => msg === 'background task failed'), { err: { message: /OOM/ } })
  await admin.del('ballast')
  while ((await app.inject('/after')).statusCode !== 200) await sleep(20)
  while (!ran.includes('after')) await sleep(20)
  t.notOk(ran.includes('during'))
})

t.test('a job written by hand runs, a malformed one fails at once, and neither stops the worker', async t => {
  const server = await opened(t, 'redis-server', () => redisServer())
  if (server === undefined) return
  t.teardown(() => server.remove())
  await server.start()
  const ran: unknown[] = []
  const note = defineTask({ name: 'note', payload: { type: 'string' }, handler (name: string, { id, requestId }) { ran.push([name, id, requestId]) } })
  const { app, logs } = await start(t, { tasks: [note], engine: bullmq({ connection: server.url }) }, { genReqId: () => '"r\n2"' })
  app.post('/', async request => ({ id: request.backgroundTasks.addTask(note, 'a "request\'s"').id }))
  await app.ready()
  const queue = new Queue('note', { connection: { url: server.url }, prefix: 'fbt' })
  t.teardown(() => queue.close())
  await queue.add('note', { payload: 'by hand', requestId: 'r-1' }, { jobId: 'mine' })
  const odd: unknown[] = [null, 7, {}, { payload: 7 }, { payload: 'odd', headers: 'none', enqueuedAt: 'never' }]
  for (const [i, data] of odd.entries()) await queue.add('note', data as object, { jobId: `odd-${i}` })
  const reply = await app.inject({ method: 'POST', url: '/', headers: { traceparent: '00-"1"-2-01' } })
  const { id } = await app.backgroundTasks.enqueue(note, 'last')
  t.strictSame((await queue.getJob(id))?.data, { payload: 'last' }, 'as one by hand: for dashboards, and for workers in other languages')
  const sent = await queue.getJob(reply.json<{ id: string }>().id)
  t.strictSame(sent?.data, { payload: 'a "request\'s"', headers: { traceparent: '00-"1"-2-01' }, requestId: '"r\n2"' })
  while (!ran.some(run => (run as unknown[])[0] === 'last')) await sleep(20)
  while (await queue.getFailedCount() < 4) await sleep(20)
  t.match(ran.filter(run => (run as unknown[])[0] !== 'last'), [['by hand', 'mine', 'r-1'], ['odd', 'odd-4', undefined]])
  t.match(await app.backgroundTasks.get(note, 'odd-3'), { state: 'failed', error: { code: 'FST_BGT_INVALID_PAYLOAD' }, attempt: 1 })
  t.equal(logs.filter(({ level, msg }) => level === 50 && msg === 'background task failed').length, 4)
})

t.test('wrong options are refused at the call, and no password is shown', async t => {
  const refused: Array<[options: unknown, message: RegExp]> = [
    [null, /bullmq/],
    [{ url: 'redis://:secret@host' }, /has no option "url"/],
    [{ connection: 'http://:secret@host' }, /"connection"/],
    [{ connection: 7 }, /"connection"/],
    [{ connection: { keyPrefix: 'secret' } }, /keyPrefix/],
    [{ prefix: '' }, /"prefix"/],
    [{ options: 1 }, /"options"/],
    [{ options: { queues: {} } }, /no option "queues"/],
    [{ options: { worker: { concurrency: 1 } } }, /concurrency/]
  ]
  for (const [options, message] of refused) {
    t.throws(() => bullmq(options as BullMqOptions), { code: 'FST_BGT_INVALID_OPTION', message })
    t.throws(() => bullmq(options as BullMqOptions), { message: /^(?!.*secret)/ })
  }
  t.equal(bullmq({ connection: { host: '127.0.0.1' }, options: { worker: { lockDuration: 10_000 } } }).name, 'bullmq')
})
