// @ts-check
/**
 * The servers of the soak, one of HTTP/1.1 and one of HTTP/2: `node soak-server.js <record> <generation>`. The process says their ports. Each task that `addTask` took,
 * each that ran, and each that the log names as skipped or abandoned is a line of the record, `accepted
 * 1-req-4-17`: in the first generation, on the list of req-4; `slow 1-req-4`: that list has a task that takes its time. It answers any
 * message with what it holds when nothing is left to run.
 */
import { appendFileSync } from 'node:fs'
import { Readable } from 'node:stream'
import { setTimeout as sleep } from 'node:timers/promises'
import middie from '@fastify/middie'
import closeWithGrace from 'close-with-grace'
import Fastify from 'fastify'
import backgroundTasks from 'fastify-background-tasks'

const [record, generation] = process.argv.slice(2)
let lines = ''
let count = 0
/** The ids of the record, by those of the log. */
const ours = new Map()
/** Named in the log before `addTask` has returned: it was called after the app had closed. */
const late = new Set()

function write (what, id) {
  lines += `${what} ${id}\n`
  if (lines.length > 100_000) flush()
}

function flush () {
  appendFileSync(record, lines)
  lines = ''
}

function readLog (line) {
  if (!line.includes('background task')) return
  const { level, msg, task, tasks } = JSON.parse(line)
  if (msg.startsWith('background task skipped')) named('skipped', task.id)
  else if (msg.startsWith('background task abandoned')) late.add(task.id)
  else if (msg.startsWith('background tasks abandoned')) tasks.forEach(({ id }) => { named('abandoned', id) })
  else if (level >= 40 && msg !== 'background task failed') write('unexpected', JSON.stringify(msg))
}

function named (what, id) {
  write(what, ours.get(id))
  ours.delete(id)
}

const kinds = {
  sync: () => {},
  async: async () => { await null },
  immediate: () => new Promise(resolve => { setImmediate(resolve) }),
  short: () => sleep(Math.random() * 20),
  slow: () => sleep(500 + Math.random() * 1_000),
  // Past the deadline of the drain.
  endless: () => sleep(4_000),
  throws: () => { throw new Error('thrown by a task') },
  rejects: async () => {
    await null
    throw undefined // eslint-disable-line no-throw-literal -- it can be thrown
  }
}

/** Nothing but a slow task before it, or an exchange that was not seen to end, makes a task wait as long. */
const OVERDUE_MS = 3_000

const COMMON = ['sync', 'async', 'immediate', 'short', 'throws', 'rejects']

function anyKind () {
  const chance = Math.random()
  if (chance < 0.0005) return 'endless'
  if (chance < 0.02) return 'slow'
  return COMMON[Math.floor(Math.random() * COMMON.length)]
}

/** Adds some tasks, under some condition, and records each that was taken. */
function add (request) {
  const when = ['success', 'error', 'always'][Math.floor(Math.random() * 3)]
  const list = Math.random() < 0.7 ? request.backgroundTasks : request.backgroundTasks.with({ when })
  const tasks = 1 + Math.floor(Math.random() * 3)
  for (let i = 0; i < tasks; i++) {
    const kind = anyKind()
    if (kind === 'slow' || kind === 'endless') write('slow', `${generation}-${request.id}`)
    accepted(request.server, request.id, run => list.addTask(run, kind))
  }
}

/** Calls a function, and another one when the first has ended. */
function whenOver (fn, then) {
  try {
    const returned = fn()
    if (returned === undefined) then()
    return returned?.finally(then)
  } catch (error) {
    then()
    throw error
  }
}

/**
 * @param app whose task it is
 * @param list what the tasks of one list have in common
 * @param addTask is given the function of the task
 */
function accepted (app, list, addTask) {
  const id = `${generation}-${list}-${count++}`
  const addedAt = performance.now()
  const task = addTask(function run (kind) {
    write('ran', id)
    if (performance.now() - addedAt > OVERDUE_MS) write('overdue', id)
    // Added by a task.
    if (Math.random() < 0.02) accepted(app, 'app', run => app.backgroundTasks.addTask(run, 'sync'))
    return whenOver(kinds[kind], () => { ours.delete(task.id) })
  })
  ours.set(task.id, id)
  if (late.has(task.id)) write('late', id)
  write('accepted', id)
}

async function handle (request) {
  add(request)
  await sleep(Math.random() * 15)
  return { hello: 'world' }
}

async function * chunks () {
  for (let i = 0; i < 10; i++) {
    await sleep(Math.random() * 5)
    yield 'x'.repeat(10_000)
  }
}

/** A server, whose requests have ids of their own. */
async function start (name, options) {
  let requests = 0
  const app = Fastify({ ...options, genReqId: ({ url }) => `${name}-${++requests}${url}`, logger: { level: 'debug', stream: { write: readLog } } })
  await app.register(backgroundTasks, { closeTimeout: 2_000, onError: () => sleep(1) })
  await app.register(middie)
  // Answers itself, and Fastify never hears of it.
  app.use('/middleware', async (_request, response) => {
    for await (const chunk of chunks()) response.write(chunk)
    response.end()
  })
  app.addHook('onRequest', async request => { if (request.url === '/middleware' && Math.random() < 0.5) add(request) })
  app.addHook('preHandler', async request => { if (Math.random() < 0.3) add(request) })
  app.setNotFoundHandler((request, reply) => {
    add(request)
    reply.raw.end('not here')
  })
  app.get('/now', async request => {
    add(request)
    return { hello: 'world' }
  })
  app.get('/wait', handle)
  app.post('/body', handle)
  app.get('/fails', async request => {
    add(request)
    await sleep(Math.random() * 5)
    throw new Error('thrown by a handler')
  })
  // Adds tasks for the failure, and answers in its own way.
  app.get('/handled', {
    async errorHandler (_error, request, reply) {
      await sleep(Math.random() * 5)
      add(request)
      return reply.code(Math.random() < 0.5 ? 200 : 502).send({ handled: true })
    }
  }, async request => {
    add(request)
    throw new Error('thrown by a handler')
  })
  app.get('/on-send', {
    async onSend (request) {
      await sleep(Math.random() * 5)
      add(request)
      if (Math.random() < 0.5) throw new Error('thrown by a hook')
    }
  }, handle)
  app.get('/stream', (request, reply) => {
    add(request)
    return reply.send(Readable.from(chunks()))
  })
  app.get('/hijacked', async (request, reply) => {
    add(request)
    reply.hijack()
    await sleep(Math.random() * 10)
    reply.raw.end('hijacked')
  })
  // Goes on after its reply.
  app.get('/late', async (request, reply) => {
    await reply.send({ hello: 'world' })
    await sleep(Math.random() * 5)
    add(request)
  })
  app.get('/timeout', { handlerTimeout: 5 }, async request => {
    add(request)
    await sleep(20)
    add(request)
  })
  await app.listen({ port: 0, host: '127.0.0.1' })
  return app
}

process.on('exit', code => {
  for (const app of apps) {
    const { pending, running } = app.backgroundTasks.stats
    if (pending + running > 0) write('unexpected', `stats: ${pending} pending and ${running} running at exit`)
  }
  write('exit', code)
  flush()
})
closeWithGrace({ delay: 10_000 }, async ({ err }) => {
  if (err !== undefined) write('unexpected', JSON.stringify(String(err.stack ?? err)))
  await Promise.all(apps.map(app => app.close()))
})

const apps = await Promise.all([start('one', {}), start('two', { http2: true })])
// Node keeps a stream for ever that its client has closed while a chunk was to be written, and its session with it, without any framework, too.
apps[1].server.on('session', session => { session.setTimeout(3_000, () => { session.destroy() }) })
process.on('message', async () => {
  await Promise.all(apps.map(app => app.backgroundTasks.idle()))
  for (let i = 0; i < 4; i++) {
    await sleep(50)
    globalThis.gc()
  }
  process.send({ heap: process.memoryUsage().heapUsed, handles: process.getActiveResourcesInfo().length })
})

process.send(apps.map(app => /** @type {import('node:net').AddressInfo} */ (app.server.address()).port))
