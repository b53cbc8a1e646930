/** What no other test holds: found by changing one line of the library at a time. */
import { once } from 'node:events'
import http from 'node:http'
import { connect, type AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import t from 'tap'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { start, deferred } from './support/app.js'
import { GroupCommit } from '../lib/dispatch/group-commit.js'
import type { Deadline } from '../lib/dispatch/deadlines.js'
import type { Job } from '../lib/engines/engine.js'

/** An exchange of which nothing more is heard ends after ten seconds: less was a sign. */
const SIGN_MS = 5_000

t.test('a reply that is hijacked after a task was added is Fastify\'s no longer: what the handler returns is not sent', async t => {
  const { app, get } = await start(t)
  let name: string | undefined
  app.get('/', async (request, reply) => {
    request.backgroundTasks.addTask(function ran () { name = 'ran' })
    reply.hijack()
    t.equal(reply.sent, true, 'Fastify knows')
    setImmediate(() => { reply.raw.end('by hand') })
    return 'by Fastify'
  })
  t.equal(await get('/'), 'by hand')
  await app.backgroundTasks.idle()
  t.equal(name, 'ran')
})

t.test('an exchange opened while its reply streams ends at the abort: the reply has passed onSend before', async t => {
  const { app, address } = await start(t)
  let seen: { request: FastifyRequest, reply: FastifyReply } | undefined
  app.get('/', async (request, reply) => {
    seen = { request, reply }
    const stream = new Readable({ read () {} })
    stream.push('part')
    return stream
  })
  const client = http.get(await address())
  client.on('error', () => {})
  const [response] = await once(client, 'response') as [http.IncomingMessage]
  response.on('error', () => {})
  const { request, reply } = seen as NonNullable<typeof seen>
  const startedAt = performance.now()
  request.backgroundTasks.addTask(() => {})
  const closed = once(reply.raw, 'close')
  client.destroy()
  await closed
  await app.backgroundTasks.idle()
  t.ok(performance.now() - startedAt < SIGN_MS)
  t.equal(request.backgroundTasks.outcome?.aborted, true)
})

t.test('a body that an abort cuts off before it is read ends the exchange, though no handler is called', async t => {
  const { app, address } = await start(t)
  const [arrived, release] = [deferred(), deferred()]
  let seen: FastifyRequest | undefined
  app.addHook('preParsing', async request => {
    seen = request
    request.backgroundTasks.addTask(() => {})
    arrived.resolve()
    await release.promise
  })
  app.post('/', async () => { t.fail('the handler is not called') })
  await address()
  const client = connect((app.server.address() as AddressInfo).port, '127.0.0.1')
  client.on('error', () => {})
  client.write('POST / HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 10\r\n\r\n[1')
  await arrived.promise
  const { raw } = seen as FastifyRequest
  const closed = once(raw, 'close').catch(() => {})
  client.destroy()
  await closed
  const startedAt = performance.now()
  release.resolve()
  await app.backgroundTasks.idle()
  t.ok(performance.now() - startedAt < SIGN_MS)
})

t.test('each request of a group gets the receipts of its own jobs', async t => {
  const commit = new GroupCommit(async jobs => jobs.map(({ id }) => ({ id, duplicate: false })))
  const jobs = (...ids: string[]): Job[] => ids.map(id => ({ id, text: '1' }) as unknown as Job)
  const deadline: Deadline = { isOver: false, dueAt: Infinity, reject () {}, index: 0 }
  const groups = [['a'], ['b', 'c'], ['d'], ['e', 'f']]
  const receipts = await Promise.all(groups.map(async ids => await commit.enqueue(jobs(...ids), deadline)))
  t.strictSame(receipts.map(group => group.map(({ id }) => id)), groups)
})
