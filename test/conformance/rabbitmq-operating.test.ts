/** What an operator asks of RabbitMQ: how many jobs there are, and to start again what has failed for good. */
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Channel, GetMessage } from 'amqplib'
import t, { type Test } from 'tap'
import { defineTask, type AnyTaskDefinition, type TaskAddedMessage } from '../../lib/index.js'
import { start, type Started } from '../support/app.js'
import { lineTo } from '../support/line.js'
import { openRabbitMq, type OpenRabbitMq } from '../support/rabbitmq.js'
import { until } from '../support/services.js'

t.setTimeout(180_000)

const LATER = { retry: { attempts: 3, backoff: { type: 'fixed', delay: 20 } } } as const

/** What a message in the queue of failed jobs looks like to a reader. */
interface Dead {
  readonly id: unknown
  readonly text: string
  readonly expiration: unknown
}

/** Reads all failed jobs, and puts them back in their order, as one consumer does. */
async function readDead ({ connection, prefix }: OpenRabbitMq, task: string): Promise<Dead[]> {
  const queue = `${prefix}.${task}.dead`
  const channel = await connection.createChannel()
  const { messageCount } = await channel.checkQueue(queue)
  const held: Dead[] = []
  await channel.consume(queue, message => {
    if (message !== null) held.push({ id: message.properties.messageId as unknown, text: message.content.toString(), expiration: message.properties.expiration as unknown })
  })
  await until(() => held.length === messageCount)
  await channel.close()
  await until(async () => await readyOf(connection, queue) === messageCount)
  return held
}

async function readyOf (connection: OpenRabbitMq['connection'], queue: string): Promise<number> {
  const channel = await connection.createChannel()
  const { messageCount } = await channel.checkQueue(queue)
  await channel.close()
  return messageCount
}

async function onServer (t: Test, use: (broker: OpenRabbitMq, serve: (tasks: readonly AnyTaskDefinition[], worker?: false | { concurrency: number }, url?: string) => Promise<Started>) => Promise<void>): Promise<void> {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  await use(broker, async (tasks, worker = { concurrency: 20 }, url = broker.url) => {
    const started = await start(t, { tasks, engine: broker.engine({ url }), worker, enqueueTimeout: 8_000 })
    await started.app.ready()
    return started
  })
}

t.test('count is exact at the moment when a job is stored or has failed, in every process, and a queue that is gone has none', async t => {
  await onServer(t, async ({ channel, prefix }, serve) => {
    const note = defineTask({ name: 'note', retry: { attempts: 1 }, handler () { throw new Error('no') } })
    const web = await serve([note], false)
    const other = await serve([note], false)
    for (let n = 1; n <= 50; n++) {
      await web.app.backgroundTasks.enqueue(note, n)
      t.strictSame(await other.app.backgroundTasks.count(note), { pending: n, failed: 0 })
    }
    await web.app.backgroundTasks.enqueue(note, 0, { delay: 60_000 })
    t.strictSame(await web.app.backgroundTasks.count(note), { pending: 50, failed: 0 }, 'what is delayed is not counted')
    await serve([note])
    await until(async () => (await channel.checkQueue(`${prefix}.note.dead`)).messageCount === 50)
    t.strictSame(await Promise.all([web, other].map(({ app }) => app.backgroundTasks.count(note))), [1, 2].map(() => ({ pending: 0, failed: 50 })))
    await channel.deleteQueue(`${prefix}.note.dead`)
    t.strictSame(await web.app.backgroundTasks.count(note), { pending: 0, failed: 0 })
    t.equal(await web.app.backgroundTasks.retry(note, 'any'), false)
    t.equal((await web.app.backgroundTasks.enqueue(note, 1)).duplicate, false, 'its channels go on')
  })
})

t.test('retry starts exactly the jobs that are asked for, once each, however many processes ask; the others stay in their order, with their time', async t => {
  await onServer(t, async (broker, serve) => {
    const { channel, prefix } = broker
    let isMended = false
    const starts: Array<{ id: string, n: number, attempt: number }> = []
    const note = defineTask({
      name: 'note',
      ...LATER,
      handler (n: number, { id, attempt }) {
        if (!isMended) throw new Error('no')
        starts.push({ id, n, attempt })
      }
    })
    const worker = await serve([note])
    const others = [await serve([note], false), await serve([note], false)]
    const receipts = await Promise.all(Array.from({ length: 200 }, async (_, n) => await worker.app.backgroundTasks.enqueue(note, n)))
    await until(async () => (await channel.checkQueue(`${prefix}.note.dead`)).messageCount === 200)
    // Messages of others, without an id, or with one of any kind.
    for (const messageId of [undefined, '', '__proto__', 'x'.repeat(255), '\0']) channel.sendToQueue(`${prefix}.note.dead`, Buffer.from('foreign'), messageId === undefined ? {} : { messageId })
    await until(async () => (await channel.checkQueue(`${prefix}.note.dead`)).messageCount === 205)
    const before = await readDead(broker, 'note')
    isMended = true
    const ids = receipts.map(({ id }) => id).filter((_, n) => n % 3 === 0)
    const answers = await Promise.all(ids.map(async id => await Promise.all([worker, ...others, worker].map(async ({ app }) => await app.backgroundTasks.retry(note, id)))))
    t.ok(answers.every(four => four.filter(Boolean).length === 1), 'of four calls for one job one is true')
    t.strictSame(await worker.app.backgroundTasks.count(note), { pending: 0, failed: before.length - ids.length })
    await until(() => starts.length >= ids.length)
    t.strictSame(starts.map(({ n }) => n).toSorted((a, b) => a - b), receipts.map((_, n) => n).filter(n => n % 3 === 0))
    t.ok(starts.every(({ id, n, attempt }) => attempt === 1 && receipts[n]?.id === id))
    t.strictSame(await readDead(broker, 'note'), before.filter(({ id }) => !ids.includes(String(id))), 'none is lost, doubled or moved')
    for (const odd of ['', 'x'.repeat(256), 'x'.repeat(5_000), 'undefined', 'null']) t.equal(await worker.app.backgroundTasks.retry(note, odd), false)
    for (const odd of ['__proto__', '\0']) t.equal(await worker.app.backgroundTasks.retry(note, odd), true, 'a job of another program')
    await until(async () => (await channel.checkQueue(`${prefix}.note.dead`)).messageCount === before.length - ids.length - 2)
  })
})

t.test('what was read and put back expires when it would have expired, and the job keeps its request, headers, context and payload', async t => {
  await onServer(t, async broker => {
    const { channel, prefix } = broker
    const seen: unknown[] = []
    const tenant = { now: 'none' }
    const context = { capture: () => tenant.now, restore: (value: unknown, run: () => unknown) => { tenant.now = String(value); return run() } }
    const note = defineTask({
      name: 'note',
      retry: { attempts: 1 },
      keep: { failed: 3 },
      handler (payload: { text: string }, { id, attempt, requestId, headers }) {
        seen.push({ id, text: payload.text.length, attempt, requestId, headers: { ...headers }, tenant: tenant.now })
        throw new Error('no')
      }
    })
    const { app } = await start(t, { tasks: [note], engine: broker.engine(), context }, { genReqId: () => 'request-7' })
    app.post('/:size', async request => {
      tenant.now = 'acme'
      return { id: request.backgroundTasks.addTask(note, { text: 'x'.repeat(Number((request.params as { size: string }).size)) }).id }
    })
    const traceparent = '00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01'
    const ids: string[] = []
    // Above 64 KiB a message has a channel for itself.
    for (const size of [5, 200_000]) ids.push((await app.inject({ method: 'POST', url: `/${size}`, headers: { traceparent } })).json<{ id: string }>().id)
    await until(async () => (await channel.checkQueue(`${prefix}.note.dead`)).messageCount === 2)
    const first = seen.splice(0)
    t.match(first, [{ text: 5, requestId: 'request-7', tenant: 'acme', headers: { traceparent } }, { text: 200_000 }])
    for (const id of ids) t.equal(await app.backgroundTasks.retry(note, id), true)
    await until(async () => (await channel.checkQueue(`${prefix}.note.dead`)).messageCount === 2)
    t.strictSame(seen, first, 'the same again, from the first attempt')
    const from = Date.now()
    while (Date.now() - from < 2_000) {
      t.equal(await app.backgroundTasks.retry(note, 'unknown'), false)
      await sleep(200)
    }
    await until(async () => (await app.backgroundTasks.count(note)).failed === 0)
    t.ok(Date.now() - from < 6_000, `${Date.now() - from} ms`)
    t.equal(await app.backgroundTasks.retry(note, ids[0] ?? ''), false, 'its record has expired')
  })
})

t.test('failed jobs that have expired behind one that has not are still counted, and hide no other one', async t => {
  await onServer(t, async ({ channel, prefix }, serve) => {
    const ran: string[] = []
    const note = defineTask({ name: 'note', handler (name: string) { ran.push(name) } })
    const { app } = await serve([note])
    for (const [name, expiration] of [['a', 60_000], ['b', 300], ['c', 300], ['d', 60_000]] as const) {
      channel.sendToQueue(`${prefix}.note.dead`, Buffer.from(JSON.stringify(name)), { messageId: name, expiration })
    }
    await sleep(600)
    t.equal((await app.backgroundTasks.count(note)).failed, 4)
    t.equal(await app.backgroundTasks.retry(note, 'b'), false)
    t.equal((await app.backgroundTasks.count(note)).failed, 2)
    t.strictSame(await Promise.all(['d', 'c', 'a'].map(async id => await app.backgroundTasks.retry(note, id))), [true, false, true])
    await until(() => ran.length === 2)
    t.strictSame(ran, ['a', 'd'], 'the first that has failed starts first')
  })
})

t.test('if the connection breaks between the copy and the acknowledgement, both are there: a job may run twice, and is never lost', async t => {
  await onServer(t, async (broker, serve) => {
    const { channel, prefix } = broker
    const line = await lineTo(Number(new URL(broker.url).port))
    t.teardown(() => { line.close() })
    const url = new URL(broker.url)
    url.port = String(line.port)
    let starts = 0
    const note = defineTask({ name: 'note', retry: { attempts: 1 }, handler () { if (++starts === 1) throw new Error('no') } })
    const worker = await serve([note])
    const { id } = await worker.app.backgroundTasks.enqueue(note)
    await until(async () => (await channel.checkQueue(`${prefix}.note.dead`)).messageCount === 1)
    const { app } = await serve([note], false, url.href)
    t.equal(app.backgroundTasks.health().connected, true)
    const Channels = Object.getPrototypeOf(channel) as Channel
    const { ack } = Channels
    Channels.ack = function (message) {
      if (message.fields.exchange === '' && message.fields.routingKey.endsWith('.dead')) line.refuse()
      else ack.call(this, message)
    }
    t.teardown(() => { Channels.ack = ack })
    t.equal(await app.backgroundTasks.retry(note, id), true)
    await until(() => starts === 2)
    await until(() => !app.backgroundTasks.health().connected)
    t.match(app.backgroundTasks.health(), { connected: false, error: /no connection to RabbitMQ/ })
    await t.rejects(app.backgroundTasks.count(note), { code: 'FST_BGT_ENGINE_UNAVAILABLE' })
    await t.rejects(app.backgroundTasks.retry(note, id), { code: 'FST_BGT_ENGINE_UNAVAILABLE' })
    line.accept()
    Channels.ack = ack
    await until(() => app.backgroundTasks.health().connected)
    t.strictSame(await app.backgroundTasks.count(note), { pending: 0, failed: 1 }, 'the message is still there')
    t.equal(await app.backgroundTasks.retry(note, id), true)
    await until(() => starts === 3)
  })
})

t.test('while another program holds failed jobs, retry waits for it, and does not say that there is no such job', async t => {
  await onServer(t, async (broker, serve) => {
    const { channel, prefix } = broker
    let starts = 0
    const note = defineTask({ name: 'note', retry: { attempts: 1 }, handler () { if (++starts <= 2) throw new Error('no') } })
    const { app } = await serve([note])
    const ids = [(await app.backgroundTasks.enqueue(note)).id, (await app.backgroundTasks.enqueue(note)).id]
    await until(async () => (await channel.checkQueue(`${prefix}.note.dead`)).messageCount === 2)
    const held = await channel.get(`${prefix}.note.dead`) as GetMessage
    const id = String(held.properties.messageId)
    t.ok(ids.includes(id))
    const impatient = await start(t, { tasks: [note], engine: broker.engine(), worker: false, enqueueTimeout: 500 })
    await t.rejects(impatient.app.backgroundTasks.retry(note, id), { code: 'FST_BGT_ENGINE_UNAVAILABLE' })
    await impatient.app.close()
    const wait = app.backgroundTasks.retry(note, id)
    await sleep(200)
    t.equal(starts, 2)
    channel.nack(held)
    t.equal(await wait, true)
    await until(() => starts === 3)
  })
})

t.test('a delivered job that a subscriber cancels is acknowledged: it does not run, here or elsewhere', async t => {
  await onServer(t, async ({ channel, prefix }, serve) => {
    const ran: string[] = []
    const note = defineTask({ name: 'note', ...LATER, handler (name: string) { ran.push(name) }, onFailed () { ran.push('failed') } })
    const web = await serve([note], false)
    const cancelled = await web.app.backgroundTasks.enqueue(note, 'cancelled')
    await web.app.backgroundTasks.enqueue(note, 'next')
    const onAdded = (message: unknown): void => {
      const { task } = message as TaskAddedMessage
      if (task.id === cancelled.id) t.equal(task.cancel(), true)
    }
    subscribe('fastify-background-tasks.added', onAdded)
    t.teardown(() => { unsubscribe('fastify-background-tasks.added', onAdded) })
    const worker = await serve([note], { concurrency: 1 })
    await until(() => ran.includes('next'))
    await worker.app.close()
    t.strictSame(await web.app.backgroundTasks.count(note), { pending: 0, failed: 0 })
    t.equal((await channel.checkQueue(`${prefix}.note`)).messageCount, 0)
    await serve([note])
    await web.app.backgroundTasks.enqueue(note, 'last')
    await until(() => ran.includes('last'))
    t.strictSame(ran, ['next', 'last'])
  })
})

t.test('a job behind 20,000 others is found, and all the others are counted when retry has answered', async t => {
  await onServer(t, async ({ channel, prefix }, serve) => {
    let ran = ''
    const note = defineTask({ name: 'note', handler (name: string, { id }) { ran = `${id} ${name}` } })
    const { app } = await serve([note])
    const most = 20_000
    for (let n = 0; n < most; n++) channel.sendToQueue(`${prefix}.note.dead`, Buffer.from('"x"'), { persistent: true, messageId: `n${n}` })
    await until(async () => (await app.backgroundTasks.count(note)).failed === most)
    for (const [i, id] of ['n19999', 'n0', 'n10000'].entries()) {
      const from = Date.now()
      t.equal(await app.backgroundTasks.retry(note, id), true)
      t.comment(`${id}: ${Date.now() - from} ms`)
      t.strictSame((await app.backgroundTasks.count(note)).failed, most - 1 - i)
      await until(() => ran === `${id} x`)
    }
    t.equal(await app.backgroundTasks.retry(note, 'unknown'), false)
    const ends = await Promise.all([app.backgroundTasks.retry(note, 'n15000').catch((error: unknown) => error), app.close()])
    t.comment(String(ends[0]))
    const left = (await channel.checkQueue(`${prefix}.note.dead`)).messageCount + (await channel.checkQueue(`${prefix}.note`)).messageCount
    t.ok(left >= most - 3, 'a close during a search loses none')
  })
})
