/** Where the RabbitMQ engine connects to: which URLs it accepts, and what it does when some of them, or all, are away. */
import { once } from 'node:events'
import { createServer, type AddressInfo, type Server, type Socket } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { rabbitmq, type RabbitMqOptions } from '../../lib/engines/rabbitmq/index.js'
import { defineTask } from '../../lib/index.js'
import { start } from '../support/app.js'
import { openRabbitMq } from '../support/rabbitmq.js'
import { freePort, proxyTo, type Proxy } from '../support/servers.js'

t.setTimeout(120_000)

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(20)
}

/** A server that accepts connections and calls `answer` with each. */
async function serverThat (t: Test, answer: (socket: Socket) => void): Promise<{ url: string, sockets: Set<Socket> }> {
  const sockets = new Set<Socket>()
  const server: Server = createServer(socket => {
    sockets.add(socket)
    socket.on('error', () => {}).on('close', () => { sockets.delete(socket) }).resume()
    answer(socket)
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  t.teardown(() => {
    server.close()
    for (const socket of sockets) socket.destroy()
  })
  return { url: `amqp://guest:guest@127.0.0.1:${(server.address() as AddressInfo).port}`, sockets }
}

t.test('wrong options are refused at the call, and no password is shown', async t => {
  const url = /^The option "url" of rabbitmq accepts an amqp: or amqps: URL with a host, or an array of such URLs that is not empty; received /
  const refused: Array<[options: unknown, message: RegExp]> = [
    [null, /^rabbitmq accepts an object of options; received null$/],
    ['amqp://:secret@host', /^rabbitmq accepts an object of options; received a string, not shown here$/],
    [{ connection: 'amqp://:secret@host' }, /^rabbitmq has no option "connection"; it accepts url, prefix, options$/],
    [{ url: 'http://:secret@host' }, url],
    [{ url: [] }, url],
    [{ url: ['amqp://:secret@host', 'http://:secret@host'] }, url],
    [{ url: ['amqp://:secret@host', undefined] }, url],
    // eslint-disable-next-line no-sparse-arrays
    [{ url: [, 'amqp://:secret@host'] }, url],
    [{ url: 'amqp:///secret' }, url],
    [{ url: 'amqp:secret' }, url],
    [{ url: { hostname: 'secret' } }, url],
    [{ url: 7 }, url],
    [{ url: 'amqp://user:secret@host?heartbeats=4' }, /^A URL of rabbitmq has a parameter that does not exist; it accepts heartbeat, frameMax, maxFrameSize, channelMax, locale$/],
    [{ url: ['amqp://host', 'amqp://user:secret@host?frameMax=64'] }, /^The parameter "frameMax" of a URL of rabbitmq accepts 0, or an integer of at least 4096$/],
    [{ url: 'amqp://user:secret@host?heartbeat=' }, /^The parameter "heartbeat"/],
    [{ prefix: '' }, /^The option "prefix" of rabbitmq accepts a string that is not empty; received ''$/],
    [{ options: 'amqp://:secret@host' }, /^The option "options" of rabbitmq accepts an object; received a string, not shown here$/],
    [{ options: { password: 'secret' } }, /^The option "options" of rabbitmq does not accept "password": it belongs in the URL$/],
    [{ options: { recovery: true } }, /does not accept "recovery": the engine restores its connections$/]
  ]
  for (const [options, message] of refused) {
    t.throws(() => rabbitmq(options as RabbitMqOptions), { code: 'FST_BGT_INVALID_OPTION', message }, String(message))
    t.throws(() => rabbitmq(options as RabbitMqOptions), { message: /^(?!.*secret)/ })
  }
  t.equal(rabbitmq({ url: 'amqps://user:password@host/vhost', options: { servername: 'host' } }).name, 'rabbitmq')
  t.equal(rabbitmq({ url: ['amqp://a?heartbeat=0', 'amqp://[::1]:5673/%2f?frameMax=8192'] }).name, 'rabbitmq')
})

t.test('several URLs: whichever answers is used, a lost one is left for the next, and an outage of all is one warning', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const port = Number(new URL(broker.url).port)
  const silent = await serverThat(t, () => {})
  const gone = `amqp://guest:guest@127.0.0.1:${await freePort()}`
  const proxies: Proxy[] = [await proxyTo(port), await proxyTo(port)]
  t.teardown(() => { for (const proxy of proxies) proxy.close() })
  const ran: number[] = []
  const tasks = Array.from({ length: 5 }, (_, i) => defineTask({ name: `note${i}`, handler (n: number) { ran.push(n) } }))
  const [note] = tasks
  if (note === undefined) throw new Error('never')
  const urls = proxies.map(({ port }) => `amqp://guest:guest@127.0.0.1:${port}`)
  const { app, logs } = await start(t, { tasks, engine: broker.engine({ url: [gone, ...urls, silent.url] }), enqueueTimeout: 10_000 })
  await app.ready()
  await app.backgroundTasks.enqueue(note, 1)
  await until(() => ran.includes(1))
  const warnings = (): string[] => logs.filter(({ level }) => level === 40).map(({ msg }) => msg)
  t.strictSame(warnings(), [])

  const lose = (proxy: Proxy): void => { proxy.freeze(); proxy.cut() }
  for (const proxy of proxies) lose(proxy)
  // Several rounds over all four, for both connections.
  await sleep(7_000)
  t.equal(warnings().length, 1)
  t.match(warnings()[0], /^background task engine "rabbitmq": There is no connection to RabbitMQ: /)
  t.notMatch(warnings().join(' '), /guest/)
  for (const proxy of proxies) proxy.thaw()
  await until(() => app.backgroundTasks.enqueue(note, 2).then(() => true, () => false))
  await until(() => ran.includes(2))

  // Whichever of the two is in use: what it served goes on over the other one.
  for (const [i, proxy] of proxies.entries()) {
    lose(proxy)
    await until(() => app.backgroundTasks.enqueue(note, i + 3).then(() => true, () => false))
    await until(() => ran.includes(i + 3))
    proxy.thaw()
  }
  for (const proxy of proxies) lose(proxy)
  const closing = performance.now()
  await app.close()
  t.ok(performance.now() - closing < 2_000, 'the close does not wait for a server')
})

t.test('close() ends a connection in whatever state it is', async t => {
  const note = defineTask({ name: 'note', handler () {} })
  const states: Record<string, (socket: Socket) => void> = {
    'a server that says nothing': () => {},
    'a server that says too little': socket => {
      const timer = setInterval(() => { socket.write('\u0001') }, 100)
      socket.on('close', () => { clearInterval(timer) })
    },
    'a server that closes at once': socket => { socket.end() },
    'a server that speaks another protocol': socket => { socket.write('HTTP/1.1 400 Bad Request\r\n\r\n') }
  }
  for (const [name, answer] of Object.entries(states)) {
    const { url, sockets } = await serverThat(t, answer)
    const { app } = await start(t, { tasks: [note], engine: rabbitmq({ url: [url, url] }), enqueueTimeout: 300 })
    await app.ready()
    await t.rejects(app.backgroundTasks.enqueue(note, 1), { code: 'FST_BGT_ENGINE_UNAVAILABLE' }, name)
    const closing = performance.now()
    await app.close()
    t.ok(performance.now() - closing < 2_000, `${name}: ${Math.round(performance.now() - closing)} ms`)
    await until(() => sockets.size === 0)
  }
})

t.test('an engine that was stopped starts again, and two names that meet are said', async t => {
  const broker = await openRabbitMq(t)
  if (broker === undefined) return
  const ran: number[] = []
  const note = defineTask({ name: 'note', handler (n: number) { ran.push(n) } })
  const engine = broker.engine()
  for (const n of [1, 2]) {
    const { app } = await start(t, { tasks: [note], engine })
    await app.ready()
    await app.backgroundTasks.enqueue(note, n)
    await until(() => ran.includes(n))
    await app.close()
  }
  const { app, logs } = await start(t, { tasks: ['note', 'note.dead'].map(name => defineTask({ name, handler () {} })), engine: broker.engine(), enqueueTimeout: 300 })
  await app.ready()
  t.ok(logs.some(({ level, msg }) => level === 40 && /the task "note.dead" would run what "note" has failed at: rename one of them/.test(msg)))
})
