/** What other people do to the queues of the RabbitMQ engine, and what their messages and subscribers say. */
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { setTimeout as sleep } from 'node:timers/promises'
import { connect, type ConfirmChannel } from 'amqplib'
import t from 'tap'
import { defineTask } from '../../lib/index.js'
import { start } from '../support/app.js'
import { lineTo } from '../support/line.js'
import { openRabbitMq } from '../support/rabbitmq.js'
import { until } from '../support/services.js'

t.setTimeout(120_000)

t.test('a queue that is deleted while many jobs are stored: a second or two later jobs are stored and run again', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const ran = new Set<number>()
  const note = defineTask({ name: 'note', handler (n: number) { ran.add(n) } })
  const { app } = await start(t, { tasks: [note], engine: broker.engine() })
  await app.ready()
  let n = 0
  for (let round = 0; round < 3; round++) {
    const jobs = Array.from({ length: 3_000 }, () => app.backgroundTasks.enqueue(note, ++n).then(() => true, () => false))
    await sleep(5)
    await broker.channel.deleteQueue(`${broker.prefix}.note`)
    const from = performance.now()
    await Promise.all(jobs)
    await until(() => app.backgroundTasks.enqueue(note, ++n).then(() => true, () => false))
    await until(() => ran.has(n))
    const took = performance.now() - from
    t.ok(took < 8_000, `${Math.round(took)} ms`)
  }
})

t.test('messages with the same id that have no queue are all published again', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const { channel, prefix } = broker
  const dead = `${prefix}.note.dead`
  const open: Array<() => void> = []
  let failed = 0
  const note = defineTask({
    name: 'note',
    retry: { attempts: 1 },
    async handler (_: number) {
      await new Promise<void>(resolve => { open.push(resolve) })
      throw new Error('always')
    },
    onFailed () { failed++ }
  })
  const { app } = await start(t, { tasks: [note], engine: broker.engine(), worker: { concurrency: 10 } })
  await app.ready()
  for (let n = 0; n < 10; n++) channel.sendToQueue(`${prefix}.note`, Buffer.from('1'), { messageId: 'order-17' })
  await until(() => open.length === 10)
  await channel.deleteQueue(dead)
  for (const end of open) end()
  await until(() => failed === 10)
  // The close waits until the server knows each verdict.
  await app.close()
  t.equal((await channel.checkQueue(dead)).messageCount, 10)
})

t.test('a header that the server would take for an order is left out, and no neighbour notices', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const add = (message: unknown): void => { Object.assign((message as { headers: object }).headers, { CC: 'x', BCC: 'y', 'x-death': 'z', tenant: 'a' }) }
  subscribe('fastify-background-tasks.enqueue', add)
  t.teardown(() => { unsubscribe('fastify-background-tasks.enqueue', add) })
  const ran: number[] = []
  const note = defineTask({ name: 'note', handler (n: number) { ran.push(n) } })
  const { app } = await start(t, { tasks: [note], engine: broker.engine() })
  await app.ready()
  await Promise.all([1, 2, 3].map(n => app.backgroundTasks.enqueue(note, n, n === 3 ? { delay: 20 } : {})))
  await until(() => ran.length === 3)
  t.strictSame(ran, [1, 2, 3])
})

t.test('a message without an id whose connection is lost while it runs is not started a second time', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const url = new URL(broker.url)
  const line = await lineTo(Number(url.port))
  t.teardown(() => { line.close() })
  url.port = String(line.port)
  const ran: number[] = []
  let end = (): void => {}
  const note = defineTask({
    name: 'note',
    async handler (n: number) {
      ran.push(n)
      if (n === 1) await new Promise<void>(resolve => { end = resolve })
    }
  })
  const { app, logs } = await start(t, { tasks: [note], engine: broker.engine({ url: url.href }), worker: { concurrency: 1 } })
  await app.ready()
  const queue = `${broker.prefix}.note`
  broker.channel.sendToQueue(queue, Buffer.from('1'))
  await until(() => ran.length === 1)
  const Channel = Object.getPrototypeOf(broker.channel) as { dispatchMessage: (...args: unknown[]) => void }
  const deliveries = t.capture(Channel, 'dispatchMessage', Channel.dispatchMessage)
  line.refuse()
  await until(() => logs.some(({ msg }) => /There is no connection/.test(msg)))
  line.accept()
  // The message has come again when the client has it: the server counts it as delivered before that.
  let received = 1
  await until(() => (received += deliveries().length) === 2)
  end()
  broker.channel.sendToQueue(queue, Buffer.from('2'))
  await until(() => ran.includes(2))
  t.strictSame(ran, [1, 2])
})

t.test('a logger that throws costs no job: neither a foreign queue nor a header that does not fit', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  await broker.channel.assertQueue(`${broker.prefix}.note`, { durable: true })
  const ran: unknown[] = []
  const note = defineTask({ name: 'note', handler (_: null, { headers }) { ran.push(Object.keys(headers)) } })
  const { app } = await start(t, { tasks: [note], engine: broker.engine({ url: `${broker.url}?frameMax=8192` }) })
  app.log.warn = () => { throw new Error('hostile') }
  app.get('/', async request => { request.backgroundTasks.addTask(note, null) })
  await app.ready()
  const reply = await app.inject({ url: '/', headers: { traceparent: '00-1-2-01', baggage: `k=${'v'.repeat(9_000)}` } })
  t.equal(reply.statusCode, 200)
  await until(() => ran.length === 1)
  t.strictSame(ran, [['traceparent']])
})

t.test('a channel that refuses for ever is replaced; a queue that is full refuses its own jobs, and none of a neighbour', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const { channel, prefix } = broker
  const full = { 'x-queue-type': 'quorum', 'x-overflow': 'reject-publish', 'x-max-length': 1 }
  await channel.assertQueue(`${prefix}.full`, { durable: true, arguments: full })
  const note = defineTask({ name: 'note', handler (_: number) {} })
  const blocked = defineTask({ name: 'full', handler () {} })
  const { app } = await start(t, { tasks: [note, blocked], engine: broker.engine(), worker: false })
  await app.ready()

  await until(() => app.backgroundTasks.enqueue(blocked).then(() => false, () => true))
  const refusing = setInterval(() => { app.backgroundTasks.enqueue(blocked).catch(() => {}) }, 20)
  t.teardown(() => { clearInterval(refusing) })
  // One after another takes seconds, and the channel is replaced meanwhile.
  for (let n = 0; n < 4_000; n++) await app.backgroundTasks.enqueue(note, n)
  clearInterval(refusing)
  t.equal((await channel.checkQueue(`${prefix}.note`)).messageCount, 4_000)

  // As RabbitMQ 3.10 does when the queue had no leader at the first message.
  const other = await connect(broker.url)
  const Channel = Object.getPrototypeOf(await other.createConfirmChannel()) as Pick<ConfirmChannel, 'publish'>
  await other.close()
  const { publish } = Channel
  t.teardown(() => { Channel.publish = publish })
  let broken: unknown
  Channel.publish = function (...args) {
    broken ??= this
    if (this !== broken) return publish.apply(this, args)
    process.nextTick(args[4] as (error: Error) => void, new Error('message nacked'))
    return true
  }
  await t.rejects(app.backgroundTasks.enqueue(note, 0))
  await until(() => app.backgroundTasks.enqueue(note, 0).then(() => true, () => false), 'a job is stored', 10_000)
})
