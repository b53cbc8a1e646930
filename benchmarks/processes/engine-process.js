// @ts-check
/**
 * One side of a comparison of engines: `node engine-process.js <engine> <way> <role> <place>`. `way` is one of the ways of an engine below:
 * `plugin`; `hand`, the library with the same promises; `bare`, the library alone; and others. `role` is `web` (serves a route that adds one
 * task), `worker` (runs them), `latency` or `delayed` (both). The process says its port, or null, and answers `cpu` (microseconds), `memory` (bytes, as
 * the operating system counts them), `ran`, `fill <n>`, `drain` (starts running what is there), `collect` (garbage) and `latency <n>` (milliseconds from stored to
 * started), `wait <waiting> <n>` (milliseconds from the call to the result of a task that another process runs, n times in each of so many
 * loops), `store <n>` (stores them one by one) and `delayed <n> <span> <rate>` (milliseconds by which n jobs, due over a span of milliseconds,
 * started late, while so many others a second are stored and run), `count <n>` and `find <n>` (milliseconds of n calls, of which each `find`
 * reads the next page of failed jobs).
 */
import Fastify from 'fastify'
import { PAYLOAD } from './ways/promises.js'

/**
 * @typedef {object} Place
 * @property {import('fastify').FastifyInstance} app gets the route that adds one task
 * @property {string} engine
 * @property {string} way
 * @property {string} role
 * @property {string} place a prefix or schema
 * @property {(payload?: unknown) => void} work runs a task
 *
 * @typedef {object} Opened
 * @property {(request?: any) => Promise<unknown>} add stores one task
 * @property {(n: number) => Promise<unknown>} fill stores many
 * @property {() => Promise<unknown>} drain starts running them
 * @property {() => Promise<unknown>} [wait] stores one task, and waits for its result
 * @property {(delay: number, payload: unknown) => Promise<unknown>} [delayed] stores one task that is due in so many milliseconds
 * @property {() => Promise<unknown>} [count] counts the jobs
 * @property {(after?: string) => Promise<{ records: readonly unknown[], next?: string }>} [find] reads a page of failed jobs
 *
 * @typedef {(place: Place) => Promise<Opened>} OpenWay
 */

const BY_HAND = {
  bullmq: async () => (await import('./ways/bullmq.js')).bullmqByHand,
  'pg-boss': async () => (await import('./ways/pg-boss.js')).pgBossByHand,
  rabbitmq: async () => (await import('./ways/rabbitmq.js')).rabbitmqByHand
}
const OTHERS = {
  plugin: async () => (await import('./ways/plugin.js')).plugin,
  'graphile-worker': async () => (await import('./ways/graphile-worker.js')).graphileWorker,
  'job-queue': async () => (await import('./ways/job-queue.js')).jobQueue
}

const [engine, way, role, place] = process.argv.slice(2)
let ran = 0
/** @type {(payload?: any) => void} */
let onRun = () => {}

function work (payload) {
  ran++
  if (process.env.BENCH_FAILS) throw new Error('as the benchmark wants it')
  onRun(payload)
}

const app = Fastify()
/** @type {OpenWay} */
const open = await (OTHERS[way] ?? BY_HAND[engine])()
const { add, fill, drain, wait, delayed, count, find } = await open({ app, engine, way, role, place, work })
if ((role === 'latency' || role === 'delayed') && way !== 'plugin') await drain()

/** Milliseconds in which all delayed jobs are stored. */
const LEAD_MS = 15_000

function withResolvers () {
  /** @type {(value?: unknown) => void} */
  let resolve
  const promise = new Promise(_resolve => { resolve = _resolve })
  return { promise, resolve }
}

/** Milliseconds of so many calls, one after another. */
async function timesOf (n, call) {
  const times = []
  for (let i = 0; i < n; i++) {
    const from = performance.now()
    await call()
    times.push(performance.now() - from)
  }
  return times
}

const answers = {
  cpu () {
    const { user, system } = process.cpuUsage()
    return user + system
  },
  collect: () => { globalThis.gc() },
  memory: () => process.memoryUsage.rss(),
  ran: () => ran,
  fill: n => fill(Number(n)),
  drain: async () => { await drain() },
  async latency (n) {
    const waits = []
    for (let i = 0; i < Number(n); i++) {
      const started = new Promise(resolve => { onRun = resolve })
      await add()
      const from = performance.now()
      await started
      waits.push(performance.now() - from)
      await new Promise(resolve => { setTimeout(resolve, 5) })
    }
    return waits
  },
  async store (n) {
    for (let i = 0; i < Number(n); i++) await add()
  },
  async delayed (n, span, rate) {
    const late = []
    const { promise, resolve } = withResolvers()
    onRun = ({ subject, text }) => {
      if (subject !== 'delayed') return
      late.push(Date.now() - Number(text))
      if (late.length === Number(n)) resolve()
    }
    // All are stored before the first one is due.
    const from = Date.now() + LEAD_MS
    for (let i = 0; i < Number(n); i += 100) {
      await Promise.all(Array.from({ length: Math.min(100, Number(n) - i) }, async (_, j) => {
        const due = from + Math.floor((i + j) * Number(span) / Number(n))
        await delayed(due - Date.now(), { ...PAYLOAD, subject: 'delayed', text: String(due) })
      }))
    }
    if (Date.now() > from) throw new Error('they were not stored in time')
    const others = Number(rate) > 0 ? setInterval(() => fill(Number(rate) / 20), 50) : undefined
    await promise
    clearInterval(others)
    return late
  },
  count: async n => await timesOf(Number(n), () => count()),
  async find (n) {
    let after
    return await timesOf(Number(n), async () => {
      const { records, next } = await find(after)
      if (records.length !== 50) throw new Error(`a page of ${records.length}`)
      after = next
    })
  },
  async wait (waiting, n) {
    const waits = []
    await Promise.all(Array.from({ length: Number(waiting) }, async () => {
      for (let i = 0; i < Number(n); i++) {
        const from = performance.now()
        await wait()
        waits.push(performance.now() - from)
      }
    }))
    return waits
  }
}

if (role === 'web') await app.listen({ port: 0, host: '127.0.0.1' })
process.on('message', async (/** @type {string} */ question) => {
  const [name, ...args] = question.split(' ')
  process.send((await answers[name](...args)) ?? null)
})
process.send(role === 'web' ? /** @type {import('node:net').AddressInfo} */ (app.server.address()).port : null)
