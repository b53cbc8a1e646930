/** `app.close()`: what runs, in which order with other plugins, and what the deadline gives up. */
import t from 'tap'
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import http from 'node:http'
import { createInterface } from 'node:readline'
import { setImmediate as turn } from 'node:timers/promises'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import backgroundTasks from '../lib/index.js'
import { collectLogs, deferred, start } from './support/app.js'

/** Keeps the process alive for a deadline that would not. */
function stayAlive (t: { teardown: (fn: () => void) => void }): void {
  const timer = setInterval(() => {}, 60_000)
  t.teardown(() => { clearInterval(timer) })
}

/** A stand-in for a database: a task that finds it closed is a failed task. */
function database (name: string, closed: string[]): (app: FastifyInstance) => Promise<void> {
  return fp(async app => {
    app.addHook('onClose', async () => { closed.push(name) })
  }, { name })
}

for (const listening of [true, false]) {
  t.test(`tasks run before any other plugin's onClose, whatever the order of registration (${listening ? 'listening' : 'inject only'})`, async t => {
    const events: string[] = []
    const { logger, logs } = collectLogs()
    const app = Fastify({ logger })
    app.register(database('before', events))
    app.register(async child => {
      child.addHook('onClose', async () => { events.push('child before') })
    })
    app.register(backgroundTasks)
    app.register(database('after', events))
    app.get('/', async request => {
      request.backgroundTasks.addTask(async function slow () {
        await turn()
        await turn()
        events.push('task')
        request.backgroundTasks.addTask(async () => { await turn(); events.push('task of a task') })
      })
      request.backgroundTasks.addCleanup(() => { events.push('cleanup') })
      return 'ok'
    })
    if (listening) {
      const address = await app.listen({ port: 0, host: '127.0.0.1' })
      await (await fetch(address)).text()
    } else {
      await app.inject('/')
    }
    app.backgroundTasks.addTask(async function ofTheApp () { await turn(); events.push('task of the app') })
    await app.close()
    t.strictSame(events.slice(0, 4).sort(), ['cleanup', 'task', 'task of a task', 'task of the app'])
    t.strictSame(events.slice(4).sort(), ['after', 'before', 'child before'])
    const waiting = logs.filter(line => line.msg === 'waiting for background tasks')
    t.match(waiting, [{ level: 30, tasks: { ofTheApp: 1 } }])
    t.match(app.backgroundTasks.stats, { succeeded: 3, pending: 0, running: 0 })
    await app.backgroundTasks.idle()
  })
}

t.test('requests in flight end and may still add tasks', async t => {
  const { app, address } = await start(t)
  const entered = deferred()
  const gate = deferred()
  const ran: string[] = []
  app.get('/', async request => {
    entered.resolve()
    await gate.promise
    request.backgroundTasks.addTask(async () => { await turn(); ran.push('added while closing') })
    return 'ok'
  })
  const reply = once(http.get(await address(), { agent: false }), 'response')
  await entered.promise
  const closed = app.close()
  await turn()
  gate.resolve()
  const [response] = await reply as [http.IncomingMessage]
  response.resume()
  await closed
  t.strictSame(ran, ['added while closing'])
})

t.test('at the deadline signals abort, and one line names each task that is abandoned', async t => {
  stayAlive(t)
  const { app, logs } = await start(t, { closeTimeout: 30 })
  const never = deferred()
  const events: string[] = []
  let signal: AbortSignal | undefined
  app.get('/', async request => {
    const tasks = request.backgroundTasks
    signal = tasks.signal
    const running = tasks.addTask(async function running (secret: string) {
      running_.signal.addEventListener('abort', () => { events.push('task signal') })
      await never.promise
      return secret
    }, 'hunter2')
    const running_ = running
    tasks.addTask(function waiting () {})
    tasks.addTask(function cancelled () {}).cancel()
    tasks.addCleanup(async () => { events.push('cleanup'); await never.promise })
    tasks.addCleanup(() => { events.push('failing cleanup'); throw new Error('cleanup') })
    tasks.addCleanup(async () => { throw new Error('cleanup') })
    return 'ok'
  })
  await app.inject('/')
  const ofTheApp = app.backgroundTasks.addTask(async function ofTheApp () { await never.promise; throw new Error('late') })
  await app.close()
  t.strictSame(events, ['task signal', 'failing cleanup', 'cleanup'])
  t.equal(signal?.aborted, true)
  t.equal(app.backgroundTasks.signal, signal)
  t.equal(ofTheApp.state, 'abandoned')
  t.equal(ofTheApp.signal.aborted, true)
  const lines = logs.filter(line => line.level === 50 && line.msg.includes('closeTimeout has passed'))
  t.equal(lines.length, 1)
  t.match(lines[0]?.msg, /running, waiting, ofTheApp/)
  t.match(lines[0]?.tasks, [
    { name: 'running', id: String, requestId: 'req-1', ageMs: Number },
    { name: 'waiting', id: String, requestId: 'req-1', ageMs: Number },
    { name: 'ofTheApp', id: String, ageMs: Number }
  ])
  t.notMatch(JSON.stringify(logs), 'hunter2')
  t.match(app.backgroundTasks.stats, { abandoned: 3, skipped: 1, pending: 0, running: 0 })
  never.resolve()
  await turn()
  t.match(app.backgroundTasks.stats, { abandoned: 3, succeeded: 0 }, 'a late end changes nothing')
  t.equal(logs.filter(line => line.msg === 'background task ended after it was cut off').length, 2)
  t.equal(logs.filter(line => line.err?.message === 'cleanup').length, 2)
})

t.test('closeTimeout 0 abandons at once, tasks of a request in flight too', async t => {
  const { app } = await start(t, { closeTimeout: 0 })
  const [entered, gate] = [deferred(), deferred()]
  const tasks = [app.backgroundTasks.addTask(() => {})]
  const cleanups: string[] = []
  app.get('/', async request => {
    tasks.push(request.backgroundTasks.addTask(() => {}))
    request.backgroundTasks.addCleanup(() => { cleanups.push('cleanup') })
    entered.resolve()
    await gate.promise
    tasks.push(request.backgroundTasks.addTask(() => {}))
    request.backgroundTasks.addCleanup(() => { cleanups.push('late cleanup') })
    return 'ok'
  })
  const reply = app.inject('/')
  await entered.promise
  await app.close()
  t.strictSame(cleanups, ['cleanup'])
  gate.resolve()
  await reply
  while (cleanups.length < 2) await turn()
  t.strictSame(tasks.map(task => task.state), ['abandoned', 'abandoned', 'abandoned'])
})

t.test('lists that wait for a seat are abandoned with the one that has it', async t => {
  stayAlive(t)
  const { app } = await start(t, { closeTimeout: 10, concurrency: 1 })
  const [first, never] = [deferred(), deferred()]
  app.backgroundTasks.addTask(async () => { await first.promise })
  for (let i = 0; i < 4; i++) app.backgroundTasks.addTask(async () => { await never.promise })
  await turn()
  first.resolve()
  await app.close()
  t.match(app.backgroundTasks.stats, { succeeded: 1, abandoned: 4, pending: 0, running: 0 })
})

t.test('an onError that never settles is cut off too', async t => {
  stayAlive(t)
  const never = deferred()
  const { app } = await start(t, { closeTimeout: 10, onError: async () => { await never.promise } })
  app.get('/', async request => {
    request.backgroundTasks.addTask(() => { throw new Error('x') })
    request.backgroundTasks.addTask(() => {})
    return 'ok'
  })
  await app.inject('/')
  await app.close()
  t.match(app.backgroundTasks.stats, { failed: 1, abandoned: 1 })
  never.resolve()
  await turn()
  t.match(app.backgroundTasks.stats, { failed: 1, abandoned: 1, pending: 0 })
})

t.test('after the close addTask does not throw: the task is abandoned, and named as an error', async t => {
  const { app, logs } = await start(t, { maxPending: 1 })
  let list: FastifyRequest['backgroundTasks'] | undefined
  const done = deferred()
  app.get('/', async request => {
    list = request.backgroundTasks
    request.backgroundTasks.addTask(() => {})
    return 'ok'
  })
  await app.inject('/')
  await app.close()
  const ofRequest = list?.addTask(function late () {})
  const ofApp = app.backgroundTasks.addTask(function lateToo () {})
  t.equal(ofRequest?.state, 'abandoned')
  t.equal(ofApp.state, 'abandoned')
  t.throws(() => app.backgroundTasks.addTask('x' as never), { code: 'FST_BGT_INVALID_TASK' })
  const lines = logs.filter(line => line.msg.startsWith('background task abandoned'))
  t.match(lines, [{ level: 50, reqId: 'req-1', task: { name: 'late' } }, { level: 50, task: { name: 'lateToo' } }])
  t.match(app.backgroundTasks.stats, { abandoned: 2, succeeded: 1 })
  list?.addCleanup(() => { done.resolve() })
  await done.promise
})

t.test('an aborted handler that never settles is not waited for beyond half of closeTimeout: then its tasks run', async t => {
  stayAlive(t)
  const { app, address } = await start(t, { closeTimeout: 200 })
  const entered = deferred()
  const never = deferred()
  const ran: unknown[] = []
  app.get('/', async request => {
    request.backgroundTasks.addTask(() => { ran.push(request.backgroundTasks.outcome) })
    entered.resolve()
    await never.promise
  })
  const request = http.get(await address())
  request.on('error', () => {})
  await entered.promise
  const gone = new Promise(resolve => { request.on('close', resolve) })
  request.destroy()
  await gone
  await app.close()
  t.match(ran, [{ statusCode: 200, failed: false, aborted: true }])
  never.resolve()
})

t.test('a preClose hook of another plugin that throws does not lose tasks', async t => {
  const { app } = await start(t)
  const events: string[] = []
  app.addHook('onClose', async () => { events.push('onClose') })
  await app.ready()
  const failing = Fastify()
  failing.addHook('preClose', async () => { throw new Error('preClose') })
  await failing.register(backgroundTasks)
  await failing.ready()
  failing.backgroundTasks.addTask(async () => { await turn(); events.push('task') })
  await failing.close().catch(() => {})
  t.strictSame(events, ['task'])
})

t.test('in an encapsulated child the drain is the child\'s', async t => {
  const events: string[] = []
  const app = Fastify()
  app.register(database('parent', events))
  app.register(async child => {
    await child.register(backgroundTasks)
    child.register(database('sibling', events))
    child.get('/', async request => {
      request.backgroundTasks.addTask(async () => { await turn(); events.push('task') })
      return 'ok'
    })
  })
  await app.inject('/')
  await app.close()
  t.equal(events[0], 'task')
  t.equal(events.length, 3)
})

t.test('SIGTERM through close-with-grace loses nothing and exits 0', async t => {
  const child = spawn(process.execPath, [...process.execArgv, 'test/support/graceful.ts'], { stdio: ['ignore', 'pipe', 'inherit'] })
  t.teardown(() => { child.kill('SIGKILL') })
  const lines: string[] = []
  const exited = once(child, 'exit')
  const reader = createInterface({ input: child.stdout })
  const [address] = await once(reader, 'line') as [string]
  reader.on('line', line => { lines.push(line) })
  await Promise.all(Array.from({ length: 20 }, async (_, i) => { await (await fetch(`${address}/${i}`)).text() }))
  child.kill('SIGTERM')
  const [code] = await exited as [number | null]
  t.equal(code, 0)
  const done = lines.filter(line => line.startsWith('done ')).map(line => Number(line.slice(5)))
  t.strictSame(done.sort((a, b) => a - b), Array.from({ length: 20 }, (_, i) => i))
  t.equal(lines.at(-1), 'database closed')
})

t.test('the deadline keeps no process alive: one in which nothing happens any more names its tasks and exits', async t => {
  const child = spawn(process.execPath, [...process.execArgv, 'test/support/graceful.ts', 'never'], { stdio: ['ignore', 'pipe', 'inherit'] })
  t.teardown(() => { child.kill('SIGKILL') })
  const lines: string[] = []
  const exited = once(child, 'exit')
  const reader = createInterface({ input: child.stdout })
  const [address] = await once(reader, 'line') as [string]
  reader.on('line', line => { lines.push(line) })
  await (await fetch(`${address}/1`)).text()
  // An exchange that has not ended, too: an aborted handler that never settles.
  const request = http.get(`${address}/never`)
  request.on('error', () => {})
  await once(reader, 'line')
  request.destroy()
  child.kill('SIGTERM')
  const [code] = await exited as [number | null]
  t.equal(code, 0)
  t.equal(lines.filter(line => line.includes('background tasks abandoned, because nothing in the process can settle them any more (a task that awaits app.close() or idle() waits for itself): never')).length, 1)
  t.ok(lines.includes('unsettled ran'))
  t.ok(lines.includes('database closed'))
})
