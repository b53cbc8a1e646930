/** Where the RabbitMQ engine meets limits of the server, queues that somebody else has made, and messages of other programs. */
import { setTimeout as sleep } from 'node:timers/promises'
import type { GetMessage } from 'amqplib'
import t from 'tap'
import { rabbitmq } from '../../lib/engines/rabbitmq/index.js'
import { defineTask } from '../../lib/index.js'
import { start } from '../support/app.js'
import { opened } from '../support/opened.js'
import { openRabbitMq, type OpenRabbitMq } from '../support/rabbitmq.js'
import { rabbitmqServer } from '../support/servers.js'
import { createServer, connect, type AddressInfo, type Socket } from 'node:net'
import { once } from 'node:events'

t.setTimeout(120_000)

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(20)
}

/** A line of 40 ms, which counts the channels that are opened. */
async function lineTo (port: number): Promise<{ port: number, opens: () => number, cut: () => void, close: () => void }> {
  let opens = 0
  const sockets = new Set<Socket>()
  const server = createServer(client => {
    const upstream = connect(port, '127.0.0.1')
    for (const [from, to] of [[client, upstream], [upstream, client]] as const) {
      sockets.add(from)
      from.on('data', chunk => { setTimeout(() => { to.write(chunk) }, 20) }).on('error', () => {}).on('close', () => { to.destroy() })
    }
    client.on('data', chunk => {
      // A method frame of `channel.open`.
      for (let i = 0; i + 11 < chunk.length; i++) if (chunk[i] === 1 && chunk.readUInt32BE(i + 7) === 0x0014000a) opens++
    })
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  const cut = (): void => { for (const socket of sockets) socket.destroy() }
  return { port: (server.address() as AddressInfo).port, opens: () => opens, cut, close: () => { server.close(); cut() } }
}

/** The URL of the broker over another port, with parameters. */
function urlOver ({ url }: OpenRabbitMq, port?: number, parameters = ''): string {
  const over = new URL(url)
  if (port !== undefined) over.port = String(port)
  over.search = parameters
  return over.href
}

t.test('many definitions over a slow line come up, are back soon after a lost connection, and are quiet when nothing comes', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const line = await lineTo(Number(new URL(broker.url).port))
  t.teardown(() => { line.close() })
  const ran = new Set<number>()
  const tasks = Array.from({ length: 40 }, (_, i) => defineTask({ name: `t${i}`, handler () { ran.add(i) } }))
  const { app, logs } = await start(t, { tasks, engine: broker.engine({ url: urlOver(broker, line.port) }), enqueueTimeout: 20_000 })
  const store = async (): Promise<void> => {
    ran.clear()
    await Promise.all(tasks.map(task => until(() => app.backgroundTasks.enqueue(task).then(() => true, () => false))))
    await until(() => ran.size === tasks.length)
  }
  const from = performance.now()
  await app.ready()
  t.comment(`up after ${Math.round(performance.now() - from)} ms`)
  await store()
  const before = line.opens()
  line.cut()
  const cutAt = performance.now()
  await store()
  const took = performance.now() - cutAt
  t.ok(took < 2_000, `all run again ${Math.round(took)} ms after the loss`)
  t.ok(line.opens() - before <= tasks.length + 3, 'nothing is declared again')
  t.equal(logs.filter(({ level }) => level === 40).length, 1, 'one warning for all')
  await sleep(10_000)
  const quiet = line.opens()
  await sleep(10_000)
  t.ok(line.opens() - quiet <= 3, `${line.opens() - quiet} channels in 10 s`)
})

t.test('a header that does not fit is left out, a long error is cut, and a copy fits again: no neighbour notices', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const { channel, prefix } = broker
  for (const frameMax of [4096, 8192]) {
    const ran: Array<[name: string, attempt: number]> = []
    const text = '失敗した理由'.repeat(1_000)
    const note = defineTask({
      name: `note${frameMax}`,
      retry: { attempts: 2, backoff: { type: 'fixed', delay: 20 } },
      handler (name: string, { attempt }) {
        ran.push([name, attempt])
        if (name === 'fails') throw new Error(text)
      }
    })
    const { app, logs } = await start(t, { tasks: [note], engine: broker.engine({ url: urlOver(broker, undefined, `frameMax=${frameMax}`) }), worker: { concurrency: 1 } }, { genReqId: () => 7 as unknown as string })
    app.post<{ Params: { name: string } }>('/:name', async request => { request.backgroundTasks.addTask(note, request.params.name) })
    const codes = await Promise.all(['a', 'b', 'huge', 'c', 'd'].map(async name =>
      (await app.inject({ method: 'POST', url: `/${name}`, headers: name === 'huge' ? { baggage: `k=${'v'.repeat(9_000)}` } : {} })).statusCode))
    t.strictSame(codes, [200, 200, 200, 200, 200])
    await until(() => ran.length === 5)
    t.equal(logs.filter(({ level, msg }) => level === 40 && /the header "baggage" of a job was left out/.test(msg)).length, 1)
    await app.inject({ method: 'POST', url: '/fails', headers: { baggage: `k=${'v'.repeat(1_500)}` } })
    await app.inject({ method: 'POST', url: '/after' })
    await until(() => ran.some(([name]) => name === 'after'))
    let dead: GetMessage | false = false
    await until(async () => (dead = await channel.get(`${prefix}.note${frameMax}.dead`, { noAck: true })) !== false)
    const stored = (dead as unknown as GetMessage).properties.headers?.['fbt-error-message'] as string
    t.ok(stored.length > 300 && text.startsWith(stored), `${stored.length} characters are kept, none of them broken`)
    t.strictSame(ran.filter(([name]) => name === 'fails').map(([, attempt]) => attempt), [1, 2])
    await app.close()
  }
})

t.test('messages with the same id are jobs of their own; a wait does not depend on a clock, and a far one is kept', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const { channel, prefix } = broker
  const ran: Array<[n: number, at: number]> = []
  const note = defineTask({
    name: 'note',
    async handler (n: number) {
      ran.push([n, performance.now()])
      await sleep(200)
    }
  })
  const { app } = await start(t, { tasks: [note], engine: broker.engine() })
  await app.ready()
  for (const n of [1, 2]) channel.sendToQueue(`${prefix}.note`, Buffer.from(String(n)), { messageId: 'order-17' })
  await until(() => ran.length === 2)
  t.strictSame(ran.splice(0).map(([n]) => n), [1, 2])

  const now = Date.now
  for (const skew of [-600_000, 600_000]) {
    const from = performance.now()
    Date.now = () => now() + skew
    // 1100 ms lie between two steps.
    const stored = app.backgroundTasks.enqueue(note, skew, { delay: 1_210 })
    Date.now = now
    await stored
    await until(() => ran.length === 1)
    const waited = (ran.pop()?.[1] ?? 0) - from
    t.ok(waited >= 1_205 && waited < 5_000, `${Math.round(waited)} ms`)
  }
  // As version 0.1 has stored it, and a wait of a year.
  channel.sendToQueue(`${prefix}.note`, Buffer.from('3'), { headers: { 'fbt-due': Date.now() + 500 } })
  const year = 365 * 86_400_000
  await app.backgroundTasks.enqueue(note, 4, { delay: year })
  await until(() => ran.length === 1)
  t.equal(ran[0]?.[0], 3)
  const longest = `${prefix}:wait:1966080000`
  let far: GetMessage | false = false
  await until(async () => (far = await channel.get(longest, { noAck: true })) !== false)
  const headers = (far as unknown as GetMessage).properties.headers
  t.equal(headers?.['fbt-wait'], year - 1_966_080_000)
})

t.test('a job that the server or a person has moved has all its attempts; a queue that counts no deliveries bounds the starts', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const { channel, prefix } = broker
  const ran: number[] = []
  const failed: number[] = []
  const note = defineTask({
    name: 'note',
    retry: { attempts: 2, backoff: { type: 'fixed', delay: 20 } },
    handler (_: unknown, { attempt }) { ran.push(attempt); throw new Error('always') },
    onFailed (_, __, { attempts }) { failed.push(attempts) }
  })
  await channel.assertQueue(`${prefix}.note`, { durable: true })
  // Delivered before, and its process died: the queue says no more than that.
  const die = async (): Promise<void> => {
    let message: GetMessage | false = false
    await until(async () => (message = await channel.get(`${prefix}.note`)) !== false)
    channel.nack(message as unknown as GetMessage, false, true)
  }
  channel.sendToQueue(`${prefix}.note`, Buffer.from('1'), { messageId: 'a' })
  await die()
  const first = await start(t, { tasks: [note], engine: broker.engine() })
  await first.app.ready()
  t.equal(first.logs.filter(({ level, msg }) => level === 40 && msg.includes(`"${prefix}.note"`) && /counts no deliveries/.test(msg)).length, 1)
  await until(() => failed.length === 1)
  t.strictSame(ran.splice(0), [2])
  await first.app.close()
  channel.sendToQueue(`${prefix}.note`, Buffer.from('2'), { messageId: 'b', headers: { 'fbt-attempts': 1 } })
  await die()
  const second = await start(t, { tasks: [note], engine: broker.engine() })
  await second.app.ready()
  await until(() => failed.length === 2)
  t.strictSame(ran, [], 'no attempt is left')

  // As shovels, the management UI and the server leave it.
  const death = { queue: `${prefix}.note`, reason: 'delivery_limit', exchange: '', 'routing-keys': [`${prefix}.note`], count: 1 }
  const wait = { ...death, queue: `${prefix}:wait:16`, reason: 'expired' }
  const shovelled = { 'x-shovelled': [{ 'shovelled-by': 'me', 'dest-queue': `${prefix}.note` }], 'x-delivery-count': 5 }
  channel.sendToQueue(`${prefix}.note`, Buffer.from('3'), { messageId: 'c', expiration: '60000', headers: { ...shovelled, 'fbt-attempts': 2, 'x-death': [death, wait] } })
  await until(() => failed.length === 3)
  t.strictSame(ran.splice(0), [1, 2])
  channel.sendToQueue(`${prefix}.note`, Buffer.from('4'), { messageId: 'd', headers: { ...shovelled, 'fbt-attempts': 1, 'x-death': [wait] } })
  await until(() => failed.length === 4)
  t.strictSame(ran, [2])
  t.ok(failed.every(attempts => attempts <= 3))
})

t.test('the server takes back the job that runs for too long, and none beside it; a payload that is too large is the fault of its request', async t => {
  const server = await opened(t, 'rabbitmq-server', () => rabbitmqServer())
  if (server === undefined) return
  t.teardown(() => server.remove())
  await server.start()
  await server.control('eval', 'application:set_env(rabbit, consumer_timeout, 5000), application:set_env(rabbit, channel_tick_interval, 500), application:set_env(rabbit, max_message_size, 200000).')
  const starts = new Map<string, number>()
  let end = (): void => {}
  const mixed = defineTask({
    name: 'mixed',
    async handler ({ name }: { name: string }) {
      starts.set(name, (starts.get(name) ?? 0) + 1)
      if (name === 'long') await new Promise<void>(resolve => { end = resolve })
      else await sleep(2_000)
    }
  })
  const open = async (): ReturnType<typeof start> => {
    const started = await start(t, { tasks: [mixed], engine: rabbitmq({ url: server.url }), worker: { concurrency: 20 } })
    await started.app.ready()
    return started
  }
  const workers = [await open(), await open()]
  const [first] = workers
  if (first === undefined) throw new Error('never')
  const { app } = first
  await app.backgroundTasks.enqueue(mixed, { name: 'long' })
  const timedOut = (): boolean => workers.some(({ logs }) => logs.some(({ msg }) => /on a channel timed out/.test(msg)))
  let n = 0
  while (!timedOut()) {
    await app.backgroundTasks.enqueue(mixed, { name: `short ${n++}` })
    await sleep(300)
  }
  await until(() => starts.size === n + 1)
  t.strictSame([...starts].filter(([name, count]) => count > 1 && name !== 'long'), [])

  const results = await Promise.allSettled([10, 300_000, 20, 150_000, 250_000].map(bytes => app.backgroundTasks.enqueue(mixed, { name: 'x'.repeat(bytes) })))
  t.strictSame(results.map(({ status }) => status), ['fulfilled', 'rejected', 'fulfilled', 'fulfilled', 'rejected'])
  end()
})
