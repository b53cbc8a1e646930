import { setTimeout as sleep } from 'node:timers/promises'
import type { GetMessage } from 'amqplib'
import t, { type Test } from 'tap'
import { rabbitmq } from '../../lib/engines/rabbitmq/index.js'
import { defineTask } from '../../lib/index.js'
import { start } from '../support/app.js'
import { opened } from '../support/opened.js'
import { openRabbitMq } from '../support/rabbitmq.js'
import { proxyTo, rabbitmqServer, type TestBroker } from '../support/servers.js'
import { outages } from './outages.js'

const open = async (t: Test): Promise<TestBroker | undefined> => await opened(t, 'rabbitmq-server', () => rabbitmqServer())

outages('rabbitmq', open, (url, prefix) => rabbitmq({ url, prefix }))

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(20)
}

t.test('a server that is short of memory or disk: jobs are refused at once, those that run end, and it goes on by itself', async t => {
  const server = await open(t)
  if (server === undefined) return
  t.teardown(() => server.remove())
  await server.start()
  const ran: string[] = []
  let end = (): void => {}
  const note = defineTask({ name: 'note', handler (name: string) { ran.push(name) } })
  const long = defineTask({
    name: 'long',
    retry: { attempts: 2, backoff: { type: 'fixed', delay: 100 } },
    async handler (name: string, { attempt }) {
      ran.push(`${name} ${attempt}`)
      await new Promise<void>(resolve => { end = resolve })
      if (attempt === 1) throw new Error('once')
    }
  })
  const { app, logs } = await start(t, { tasks: [note, long], engine: rabbitmq({ url: server.url }), enqueueTimeout: 1_000 })
  app.get<{ Params: { name: string } }>('/:name', async request => { request.backgroundTasks.addTask(note, request.params.name) })
  t.equal((await app.inject('/before')).statusCode, 200)
  await app.backgroundTasks.enqueue(long, 'long')
  await until(() => ran.includes('long 1'))
  await server.control('set_vm_memory_high_watermark', '0.0')
  const isBlocked = (): boolean => /blocked/.test(logs.findLast(({ msg }) => msg === 'background task failed')?.err?.message ?? '')
  // The first one may have been on its way; the server blocks the connection when it sees one.
  await until(async () => (await app.inject('/during')).statusCode === 503 && isBlocked())
  const from = Date.now()
  const refused = await app.inject('/refused')
  t.equal(refused.statusCode, 503)
  t.match(refused.json(), { code: 'FST_BGT_ENGINE_UNAVAILABLE' })
  t.ok(Date.now() - from < 500, 'without a wait')
  end()
  await until(() => logs.some(({ msg }) => /attempt failed/.test(msg)))
  await server.control('set_vm_memory_high_watermark', '0.4')
  await until(async () => (await app.inject('/after')).statusCode === 200)
  await until(() => ran.includes('after') && ran.includes('long 2'))
  end()
  t.notOk(ran.includes('refused'))

  await server.control('set_disk_free_limit', '1000000GB')
  await until(async () => (await app.inject('/full')).statusCode === 503 && isBlocked())
  t.match(logs.findLast(({ msg }) => msg === 'background task failed')?.err?.message, /disk/)
  await server.control('set_disk_free_limit', '1MB')
  await until(async () => (await app.inject('/free')).statusCode === 200)
  await until(() => ran.includes('free'))
})

t.test('a job that the server takes back because it runs for too long goes on where it runs, and starts once', async t => {
  const server = await open(t)
  if (server === undefined) return
  t.teardown(() => server.remove())
  await server.start()
  await server.control('eval', 'application:set_env(rabbit, consumer_timeout, 1000), application:set_env(rabbit, channel_tick_interval, 200).')
  const ran: string[] = []
  let end = (): void => {}
  const long = defineTask({
    name: 'long',
    async handler (name: string, { attempt }) {
      ran.push(`${name} ${attempt}`)
      if (name === 'long') await new Promise<void>(resolve => { end = resolve })
    }
  })
  const { app, logs } = await start(t, { tasks: [long], engine: rabbitmq({ url: server.url }) })
  await app.ready()
  await app.backgroundTasks.enqueue(long, 'long')
  await until(() => logs.some(({ msg }) => /timed out/.test(msg)))
  t.comment(logs.find(({ msg }) => /timed out/.test(msg))?.msg)
  await app.backgroundTasks.enqueue(long, 'short')
  await until(() => ran.includes('short 1'))
  t.strictSame(ran, ['long 1', 'short 1'])
  end()
  await app.backgroundTasks.idle()
  await app.close()
  const again = await start(t, { tasks: [long], engine: rabbitmq({ url: server.url }) })
  await again.app.ready()
  await again.app.backgroundTasks.enqueue(long, 'last')
  await until(() => ran.includes('last 1'))
  t.strictSame(ran, ['long 1', 'short 1', 'last 1'])
})

t.test('a queue deleted by hand, and one declared again at once: what is accepted runs, without a restart', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const { channel, prefix } = broker
  const ran = new Set<number>()
  const note = defineTask({ name: 'note', handler (n: number) { ran.add(n) } })
  const web = await start(t, { tasks: [note], engine: broker.engine(), worker: false })
  await web.app.ready()
  // In the moment of the change the server may refuse, which is a 503.
  const store = (n: number): Promise<void> => until(() => web.app.backgroundTasks.enqueue(note, n).then(() => true, () => false))
  await channel.deleteQueue(`${prefix}.note`)
  await store(1)
  const worker = await start(t, { tasks: [note], engine: broker.engine() })
  await worker.app.ready()
  await until(() => ran.has(1))
  await channel.deleteQueue(`${prefix}.note`)
  await until(() => worker.logs.some(({ msg }) => /cancelled the consumer/.test(msg)))
  await store(2)
  await until(() => ran.has(2))
  await channel.deleteQueue(`${prefix}.note`)
  await channel.assertQueue(`${prefix}.note`, {
    durable: true,
    arguments: {
      'x-queue-type': 'quorum',
      'x-overflow': 'reject-publish',
      'x-delivery-limit': 1_000_000_000,
      'x-dead-letter-strategy': 'at-least-once',
      'x-dead-letter-exchange': '',
      'x-dead-letter-routing-key': `${prefix}.note.dead`
    }
  })
  await store(3)
  // Nobody is told: it is found within two looks of 10 s.
  await until(() => ran.has(3))
  t.strictSame([...ran], [1, 2, 3])
})

t.test('a job that waits is not behind one that waits longer; a wait that was deleted is declared again', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const { channel, prefix } = broker
  const ran: Array<[ms: number, late: number]> = []
  const note = defineTask({ name: 'note', handler ([ms, at]: [number, number]) { ran.push([ms, Date.now() - at - ms]) } })
  const { app } = await start(t, { tasks: [note], engine: broker.engine() })
  await app.ready()
  // A wait that were rounded up would be behind the one before it.
  const delays = [2_100, 1_120, 1_010, 700, 300, 90, 20]
  const isInOrder = (): boolean => ran.every(([ms], i) => ms === delays.at(-1 - i))
  // The first round declares the queues, which takes its time. On a busy machine a job may be late once, and never each time.
  for (let round = 0; round < 5 && (round === 0 || !isInOrder()); round++) {
    ran.length = 0
    await Promise.all(delays.map(delay => app.backgroundTasks.enqueue(note, [delay, Date.now()], { delay })))
    await until(() => ran.length === delays.length)
    t.comment(`late by: ${ran.map(([ms, late]) => `${late} of ${ms}`).join(', ')} ms`)
    t.ok(ran.every(([, late]) => late >= 0), 'never early')
  }
  t.ok(isInOrder(), 'the shortest wait ends first')
  await channel.deleteExchange(`${prefix}:wait:1000`)
  await channel.deleteQueue(`${prefix}:wait:500`)
  // The server closes the channel over an exchange that is not there: at worst one is refused.
  await until(() => app.backgroundTasks.enqueue(note, [1_000, Date.now()], { delay: 1_000 }).then(() => true, () => false))
  await app.backgroundTasks.enqueue(note, [500, Date.now()], { delay: 500 })
  await until(() => ran.length >= delays.length + 2)
})

t.test('what has failed for good can be read and put back; a job written by hand runs, a malformed one fails at once', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const { channel, prefix } = broker
  const ran: unknown[] = []
  let failure: Error | undefined = Object.assign(new RangeError('no paper'), { code: 'E_PAPER' })
  const note = defineTask({
    name: 'note',
    payload: { type: 'object', required: ['name'], properties: { name: { type: 'string' } } },
    retry: { attempts: 2, backoff: { type: 'fixed', delay: 20 } },
    handler ({ name }: { name: string }, { id, attempt, headers, requestId }) {
      ran.push({ name, id, attempt, headers, requestId })
      if (name === 'doomed' && failure !== undefined) throw failure
    }
  })
  const { app } = await start(t, { tasks: [note], engine: broker.engine() })
  await app.ready()
  const queue = `${prefix}.note`
  const read = async (): Promise<GetMessage> => {
    let message: GetMessage | false = false
    await until(async () => (message = await channel.get(`${queue}.dead`)) !== false)
    return message as unknown as GetMessage
  }
  const { id } = await app.backgroundTasks.enqueue(note, { name: 'doomed' })
  const dead = await read()
  t.equal(dead.content.toString(), '{"name":"doomed"}')
  t.match(dead.properties, {
    messageId: id,
    type: 'note',
    contentType: 'application/json',
    expiration: String(604_800_000),
    headers: { 'fbt-failed-attempt': 2, 'fbt-failed-at': /^20/, 'fbt-error-name': 'RangeError', 'fbt-error-message': 'no paper', 'fbt-error-code': 'E_PAPER' }
  })
  const putBack = (message: GetMessage): void => {
    channel.sendToQueue(queue, message.content, message.properties)
    channel.ack(message)
  }
  failure = new Error('no ink')
  putBack(dead)
  const again = await read()
  t.match(again.properties.headers, { 'fbt-failed-attempt': 2, 'fbt-error-name': 'Error', 'fbt-error-message': 'no ink' })
  t.notOk('fbt-error-code' in (again.properties.headers ?? {}), 'nothing is left of the failure before')
  failure = undefined
  putBack(again)
  await until(() => ran.length === 5)
  t.match(ran.splice(0), [{ id, attempt: 1 }, { id, attempt: 2 }, { id, attempt: 1 }, { id, attempt: 2 }, { name: 'doomed', id, attempt: 1 }])

  channel.sendToQueue(queue, Buffer.from('{"name":"by hand"}'), { messageId: 'mine', correlationId: 'r-1', headers: { 'x-tenant': 'a', nested: { a: 1 }, 'x-delivery-count': 7 } })
  await until(() => ran.length === 1)
  t.strictSame(ran[0], { name: 'by hand', id: 'mine', attempt: 1, headers: { 'x-tenant': 'a' }, requestId: 'r-1' })
  const odd = ['', 'no JSON', '7', 'null', '{"name":', '\u0000']
  for (const text of odd) channel.sendToQueue(queue, Buffer.from(text), { headers: { 'fbt-attempts': 'many', 'fbt-due': 'soon' } })
  channel.sendToQueue(queue, Buffer.from('7'), { headers: { long: 'x'.repeat(65_400) } })
  const failed: string[] = []
  for (let i = 0; i <= odd.length; i++) {
    const message = await read()
    channel.ack(message)
    failed.push(message.content.toString())
    t.match(message.properties.headers, { 'fbt-error-code': 'FST_BGT_INVALID_PAYLOAD', 'fbt-failed-attempt': 1 })
  }
  t.strictSame(failed.sort(), [...odd, '7'].sort())
  t.equal(ran.length, 1)
})

t.test('a lost connection starts nothing twice that still runs here', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const starts: string[] = []
  let end = (): void => {}
  const long = defineTask({
    name: 'long',
    retry: { attempts: 2, backoff: { type: 'fixed', delay: 20 } },
    async handler (name: string, { attempt }) {
      starts.push(`${name} ${attempt}`)
      if (name === 'behind') return
      await new Promise<void>(resolve => { end = resolve })
      if (attempt === 1) throw new Error('once')
    }
  })
  const url = new URL(broker.url)
  const proxy = await proxyTo(Number(url.port))
  t.teardown(() => { proxy.close() })
  url.port = String(proxy.port)
  const { app, logs } = await start(t, { tasks: [long], engine: broker.engine({ url: url.href }) })
  await app.ready()
  await app.backgroundTasks.enqueue(long, 'first')
  await until(() => starts.length === 1)
  const consumers = async (): Promise<number> => (await broker.channel.checkQueue(`${broker.prefix}.long`)).consumerCount
  proxy.cut()
  await until(() => logs.some(({ level }) => level === 40))
  await until(async () => await consumers() === 1)
  // The server delivers again what it had delivered before, ahead of all else.
  await until(() => app.backgroundTasks.enqueue(long, 'behind').then(() => true, () => false))
  await until(() => starts.includes('behind 1'))
  t.strictSame(starts, ['first 1', 'behind 1'])
  end()
  await until(() => starts.length === 3)
  t.strictSame(starts, ['first 1', 'behind 1', 'first 2'])
  end()
})

t.test('a queue that someone has declared with other settings is used, with a warning', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const ran: number[] = []
  const note = defineTask({ name: 'note', handler (n: number) { ran.push(n) } })
  await broker.channel.assertQueue(`${broker.prefix}.note`, { durable: true })
  const { app, logs } = await start(t, { tasks: [note], engine: broker.engine() })
  await app.ready()
  await app.backgroundTasks.enqueue(note, 1)
  await until(() => ran.length === 1)
  t.equal(logs.filter(({ level, msg }) => level === 40 && /exists with other settings/.test(msg)).length, 1)
})
