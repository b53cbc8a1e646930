// @ts-check
/**
 * What a task of one list costs, without HTTP: `node lists.js <kind> <size>`. It says nanoseconds for one task.
 *
 * The collector copies what outlives it, so a list too long for the young generation costs more per task the longer it
 * is, whatever the code: its pauses are counted apart, and `plain` shows them for an array of functions and arguments.
 */
import { PerformanceObserver } from 'node:perf_hooks'
import Fastify from 'fastify'
import backgroundTasks from 'fastify-background-tasks'

const [kind, sizeArgument] = process.argv.slice(2)
const size = Number(sizeArgument)
const WARM_UP = { size: 1_000, lists: 300 }
const lists = Math.max(7, 1_000_000 / size)

let ran = 0
const functions = {
  sync (by) { ran += by },
  async async (by) { ran += by },
  immediate (by) {
    ran += by
    return new Promise(resolve => { setImmediate(resolve) })
  }
}

const app = Fastify()
await app.register(backgroundTasks)
let making
app.get('/', async request => { making(request.backgroundTasks) })

/** The list of a request: how long it took to add the tasks, and from the start of the first to the end of the last. */
async function runList (fn, length) {
  const times = {}
  making = list => {
    list.addTask(() => { times.runFrom = performance.now() })
    times.addFrom = performance.now()
    for (let i = 0; i < length; i++) list.addTask(fn, 1)
    times.addTo = performance.now()
    list.addTask(() => { times.runTo = performance.now() })
  }
  await app.inject('/')
  await app.backgroundTasks.idle()
  return times
}

function runPlain (fn, length) {
  const tasks = []
  const addFrom = performance.now()
  for (let i = 0; i < length; i++) tasks.push({ fn, args: [1] })
  const addTo = performance.now()
  const runFrom = addTo
  for (let i = 0; i < length; i++) {
    const { fn, args } = tasks[i]
    tasks[i] = undefined
    fn(...args)
  }
  return { addFrom, addTo, runFrom, runTo: performance.now() }
}

async function runLoop (fn, length) {
  const loop = new Array(length).fill(fn)
  const runFrom = performance.now()
  for (const fn of loop) await fn(1)
  return { addFrom: runFrom, addTo: runFrom, runFrom, runTo: performance.now() }
}

const pauses = []
const observer = new PerformanceObserver(entries => { pauses.push(...entries.getEntries()) })

/** Nanoseconds for one task: medians over the lists; of the pauses the mean, for they come in few of them. */
function costOf (times) {
  const add = median(times.map(({ addFrom, addTo }) => addTo - addFrom - pausedBetween(addFrom, addTo)))
  const run = median(times.map(({ runFrom, runTo }) => runTo - runFrom - pausedBetween(runFrom, runTo)))
  const paused = pauses.reduce((sum, { duration }) => sum + duration, 0)
  const nanoseconds = 1e6 / size
  return { add: add * nanoseconds, run: run * nanoseconds, pauses: paused / times.length * nanoseconds }
}

function median (values) {
  return values.sort((a, b) => a - b)[values.length >> 1]
}

function pausedBetween (from, to) {
  let paused = 0
  for (const { startTime, duration } of pauses) {
    if (startTime >= from && startTime < to) paused += duration
  }
  return paused
}

async function measure (run, fn) {
  for (let i = 0; i < WARM_UP.lists; i++) await run(fn, WARM_UP.size)
  await run(fn, size)
  observer.observe({ type: 'gc' })
  pauses.length = 0
  const times = []
  for (let i = 0; i < lists; i++) {
    times.push(await run(fn, size))
    await new Promise(resolve => { setImmediate(resolve) })
  }
  // The observer is told on a later turn.
  await new Promise(resolve => { setTimeout(resolve, 50) })
  observer.disconnect()
  return costOf(times)
}

const kinds = {
  sync: () => measure(runList, functions.sync),
  plain: () => measure(runPlain, functions.sync),
  async: () => measure(runList, functions.async),
  asyncLoop: () => measure(runLoop, functions.async),
  immediate: () => measure(runList, functions.immediate),
  immediateLoop: () => measure(runLoop, functions.immediate)
}

const cost = await kinds[kind]()
const expected = WARM_UP.lists * WARM_UP.size + (lists + 1) * size
if (ran !== expected) throw new Error(`${ran} tasks ran in place of ${expected}: the figures mean nothing`)
process.send(cost)
