import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { connect } from 'amqplib'
import { Redis } from 'ioredis'
import pg from 'pg'
import { waitsOf } from '../test/support/rabbitmq.js'
import { Child } from './child.js'
import { Load } from './load.js'
import { median, printHeading, printRow } from './report.js'

export type Engine = 'bullmq' | 'pg-boss' | 'rabbitmq'
/** See engine-process.js. */
export type Way = 'plugin' | 'hand' | 'bare' | 'best' | 'graphile-worker' | 'job-queue'
type Role = 'web' | 'worker' | 'latency' | 'delayed'

export const WHAT: Record<Way, string> = {
  plugin: 'the plugin',
  hand: 'the same promises by hand',
  bare: 'the library alone',
  best: 'the library at its fastest',
  'graphile-worker': 'graphile-worker',
  'job-queue': '@platformatic/job-queue'
}

/** In turns with the other side: the machine changes its speed within seconds. */
const SLICES = 4
const JOBS = 20_000
/** Jobs, or requests, before anything is measured: V8 interprets at first. */
const WARM_UP = 10_000

interface Requests {
  readonly engine: Engine
  readonly against: Way
  readonly clients: number
  /** The least ratio of requests per second. */
  readonly rate?: number
  /** The most that a request may cost in CPU time, as a ratio. */
  readonly cpu?: number
}

interface Compared {
  readonly engine: Engine
  readonly against: Way
  readonly limit?: number
}

const REQUESTS: readonly Requests[] = [
  { engine: 'bullmq', against: 'hand', clients: 50, rate: 1, cpu: 1.05 },
  { engine: 'bullmq', against: 'bare', clients: 50 },
  { engine: 'bullmq', against: 'job-queue', clients: 50 },
  { engine: 'pg-boss', against: 'hand', clients: 50, rate: 5, cpu: 1.05 },
  { engine: 'pg-boss', against: 'hand', clients: 200, rate: 8 },
  { engine: 'pg-boss', against: 'graphile-worker', clients: 50, rate: 8 },
  { engine: 'rabbitmq', against: 'hand', clients: 50, rate: 1, cpu: 1.05 },
  { engine: 'rabbitmq', against: 'bare', clients: 50 }
]

const DRAINS: readonly Compared[] = [
  { engine: 'bullmq', against: 'hand', limit: 1 },
  { engine: 'bullmq', against: 'job-queue' },
  { engine: 'pg-boss', against: 'hand' },
  { engine: 'pg-boss', against: 'best', limit: 1.3 },
  { engine: 'pg-boss', against: 'graphile-worker', limit: 1.1 },
  { engine: 'rabbitmq', against: 'hand', limit: 1 }
]

const LATENCIES: readonly Compared[] = [
  { engine: 'bullmq', against: 'hand', limit: 1.1 },
  { engine: 'bullmq', against: 'job-queue' },
  { engine: 'pg-boss', against: 'hand', limit: 1.1 },
  { engine: 'pg-boss', against: 'graphile-worker' },
  { engine: 'rabbitmq', against: 'hand', limit: 1.3 }
]

const IDLE: ReadonlyArray<readonly [Engine, readonly Way[]]> = [
  ['bullmq', ['plugin', 'hand', 'job-queue']],
  ['pg-boss', ['plugin', 'hand', 'graphile-worker']],
  ['rabbitmq', ['plugin', 'hand']]
]

export const { REDIS_URL = 'redis://127.0.0.1:6379', POSTGRES_URL = 'postgres://postgres@127.0.0.1:5432/test', RABBITMQ_URL = 'amqp://guest:guest@127.0.0.1:5672' } = process.env
const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)

/** The plugin on an engine, against its library by hand and against what one would pick instead. */
export async function benchEngines (rounds: number): Promise<void> {
  printHeading(`Engines: median of ${rounds} alternating rounds (range)`)
  for (const row of REQUESTS.filter(canRun)) await benchRequests(row, rounds)
  for (const row of DRAINS.filter(canRun)) await benchDrain(row, rounds)
  for (const row of LATENCIES.filter(canRun)) await benchLatency(row, rounds)
  for (const [engine, ways] of IDLE) await benchIdle(engine, ways.filter(against => canRun({ engine, against })))
  for (const engine of ['bullmq', 'pg-boss', 'rabbitmq'] as const) await benchWorkers(engine)
}

export function canRun ({ engine, against }: Compared | Requests): boolean {
  const can = against !== 'job-queue' || major > 22 || (major === 22 && minor >= 19)
  if (!can) printRow({ what: `${engine}: ${WHAT[against]}`, figure: 'skipped: it needs Node 22.19' })
  return can
}

/** Requests per second of a route that adds one task, and what a request costs the process. */
async function benchRequests ({ engine, against, clients, rate: rateLimit, cpu: cpuLimit }: Requests, rounds: number): Promise<void> {
  const rates: number[] = []
  const cpus: number[] = []
  const sides: Record<string, { rate: number, cpu: number }[]> = { plugin: [], [against]: [] }
  // Fresh processes each round: two of one program differ by some percent as long as they live.
  for (let round = 0; round < rounds; round++) {
    await inPlaces(engine, async places => {
      const ways: Way[] = ['plugin', against]
      const servers = await Promise.all(ways.map(async (way, i) => {
        const child = await startEngine<number>(engine, way, 'web', places[i] ?? '')
        const requests = engine !== 'pg-boss' || way === 'plugin' ? 2_000 : 400
        return { way, child, requests, load: await Load.connect(child.ready, clients), ms: 0, micros: 0 }
      }))
      for (const { load, requests } of servers) await load.run(Math.min(WARM_UP, 8 * requests))
      for (let slice = 0; slice < SLICES; slice++) {
        for (const server of (round + slice) % 2 === 0 ? servers : servers.toReversed()) {
          const cpu = await server.child.ask('cpu') as number
          const from = performance.now()
          await server.load.run(server.requests)
          server.ms += performance.now() - from
          server.micros += await server.child.ask('cpu') as number - cpu
        }
      }
      const results: Record<string, { rate: number, cpu: number }> = {}
      for (const { way, child, load, requests, ms, micros } of servers) {
        results[way] = { rate: SLICES * requests / ms * 1_000, cpu: micros / (SLICES * requests) }
        sides[way]?.push(results[way])
        load.close()
        await child.stop()
      }
      const { plugin, [against]: other } = results
      rates.push((plugin?.rate ?? NaN) / (other?.rate ?? NaN))
      cpus.push((plugin?.cpu ?? NaN) / (other?.cpu ?? NaN))
    })
  }
  const of = (way: string, part: 'rate' | 'cpu'): string => median(sides[way]?.map(side => side[part]) ?? []).toFixed(0)
  const what = `${WHAT[against]}, ${clients} clients`
  printRow({
    what: `${engine}: requests/s, plugin / ${what}`,
    figure: `${show(rates)}, ${of('plugin', 'rate')} / ${of(against, 'rate')}`,
    ...rateLimit !== undefined && { limit: `>= ${rateLimit}`, met: median(rates) >= rateLimit }
  })
  printRow({
    what: `${engine}: CPU per request, plugin / ${what}`,
    figure: `${show(cpus)}, ${of('plugin', 'cpu')} / ${of(against, 'cpu')} µs`,
    ...cpuLimit !== undefined && { limit: `<= ${cpuLimit}`, met: median(cpus) <= cpuLimit }
  })
}

/** Jobs per second of one process that runs 20,000 of them, behind those that warm it up. */
async function benchDrain ({ engine, against, limit }: Compared, rounds: number): Promise<void> {
  const ratios: number[] = []
  const rates: Record<string, number[]> = { plugin: [], [against]: [] }
  for (let round = 0; round < rounds; round++) {
    const rate: Record<string, number> = {}
    const ways: Way[] = round % 2 === 0 ? ['plugin', against] : [against, 'plugin']
    for (const way of ways) {
      rate[way] = await drainRate(engine, way, WARM_UP, JOBS, 1)
      rates[way]?.push(rate[way])
    }
    ratios.push((rate['plugin'] ?? NaN) / (rate[against] ?? NaN))
  }
  printRow({
    what: `${engine}: drain, plugin / ${WHAT[against]}`,
    figure: `${show(ratios)}, ${median(rates['plugin'] ?? []).toFixed(0)} / ${median(rates[against] ?? []).toFixed(0)} jobs/s`,
    ...limit !== undefined && { limit: `>= ${limit}`, met: median(ratios) >= limit }
  })
}

async function drainRate (engine: Engine, way: Way, before: number, jobs: number, processes: number): Promise<number> {
  let rate = NaN
  await inPlaces(engine, async ([place = '']) => {
    const filler = await startEngine<number>(engine, way, 'web', place)
    await filler.ask(`fill ${before + jobs}`)
    await filler.stop()
    const workers = await Promise.all(Array.from({ length: processes }, async () => await startEngine<null>(engine, way, 'worker', place)))
    rate = await rateOf(workers, before, jobs)
    for (const worker of workers) await worker.stop()
  })
  return rate
}

/** Jobs per second of workers that have enough to run, behind those that warm them up. */
export async function rateOf (workers: readonly Child<null>[], before: number, jobs: number): Promise<number> {
  const ran = async (): Promise<number> => (await Promise.all(workers.map(async worker => await worker.ask('ran') as number))).reduce((sum, n) => sum + n, 0)
  let first = 0
  let from = performance.now()
  await Promise.all(workers.map(async worker => await worker.ask('drain')))
  while (first < before) {
    await sleep(5)
    first = await ran()
    from = performance.now()
  }
  // As it happens in a worker sooner or later. What is in V8's old generation then makes what comes later outlive its time there, and the
  // worker is slower until its end: a process that is too young for it would not show that.
  await Promise.all(workers.map(async worker => await worker.ask('collect')))
  first = await ran()
  from = performance.now()
  while (await ran() < before + jobs) await sleep(5)
  return (before + jobs - first) / (performance.now() - from) * 1_000
}

/** Milliseconds from the receipt to the start of a job, on an idle worker. */
async function benchLatency ({ engine, against, limit }: Compared, rounds: number): Promise<void> {
  const waits: Record<string, number[]> = { plugin: [], [against]: [] }
  await inPlaces(engine, async places => {
    const children = await Promise.all((['plugin', against] as const).map(async (way, i) => ({ way, child: await startEngine<null>(engine, way, 'latency', places[i] ?? '') })))
    for (const { child } of children) {
      await warmUp(child)
      await child.ask('latency 5')
    }
    for (let round = 0; round < rounds; round++) {
      for (const { way, child } of children) waits[way]?.push(...await child.ask('latency 100') as number[])
    }
    for (const { child } of children) await child.stop()
  })
  for (const [name, share] of [['p50', 0.5], ['p99', 0.99]] as const) {
    const [plugin = NaN, other = NaN] = ['plugin', against].map(way => quantile(waits[way] ?? [], share))
    printRow({
      what: `${engine}: from stored to started, ${name}, plugin / ${WHAT[against]}`,
      figure: `${(plugin / other).toFixed(2)}, ${plugin.toFixed(2)} / ${other.toFixed(2)} ms`,
      ...limit !== undefined && { limit: `<= ${limit}`, met: plugin / other <= limit }
    })
  }
}

/** Megabytes of a worker that has run some jobs, and is idle. */
async function benchIdle (engine: Engine, ways: readonly Way[]): Promise<void> {
  const figures: string[] = []
  for (const way of ways) {
    await inPlaces(engine, async ([place = '']) => {
      const worker = await startEngine<null>(engine, way, 'latency', place)
      await worker.ask('latency 20')
      await sleep(1_000)
      figures.push(`${(await worker.ask('memory') as number / 1e6).toFixed(0)} (${WHAT[way]})`)
      await worker.stop()
    })
  }
  printRow({ what: `${engine}: memory of an idle worker`, figure: `${figures.join(', ')} MB` })
}

/** As a process is that has been at work for a while: V8 interprets at first. */
export async function warmUp (child: Child<null>): Promise<void> {
  await child.ask(`fill ${WARM_UP}`)
  while (await child.ask('ran') as number < WARM_UP) await sleep(20)
}

async function benchWorkers (engine: Engine): Promise<void> {
  const rates: string[] = []
  for (const processes of [1, 2, 4]) rates.push((await drainRate(engine, 'plugin', processes * WARM_UP, JOBS, processes)).toFixed(0))
  printRow({ what: `${engine}: drain by one, two, four processes`, figure: `${rates.join(', ')} jobs/s` })
}

/** @param environment what `ways/promises.js` reads */
export async function startEngine<Ready> (engine: Engine, way: Way, role: Role, place: string, environment: NodeJS.ProcessEnv = {}): Promise<Child<Ready>> {
  return await Child.start<Ready>('engine-process.js', [engine, way, role, place], ['--expose-gc'], environment)
}

/** Two places of their own, which are gone afterwards, with the queues of these definitions. */
export async function inPlaces (engine: Engine, use: (places: string[]) => Promise<void>, names: readonly string[] = ['bench']): Promise<void> {
  const places = Array.from({ length: 2 }, () => `fbt_bench_${randomUUID().slice(0, 8)}`)
  try {
    await use(places)
  } finally {
    const remove = { bullmq: removeKeys, 'pg-boss': dropSchema, rabbitmq: deleteQueues }[engine]
    await Promise.all(places.map(async place => { await remove(place, names) }))
  }
}

async function removeKeys (prefix: string): Promise<void> {
  const redis = new Redis(REDIS_URL)
  for await (const keys of redis.scanStream({ match: `${prefix}:*`, count: 1_000 })) {
    if ((keys as string[]).length > 0) await redis.unlink(...keys as string[])
  }
  redis.disconnect()
}

async function dropSchema (schema: string): Promise<void> {
  const client = new pg.Client({ connectionString: POSTGRES_URL })
  await client.connect()
  await client.query(`drop schema if exists ${schema} cascade`)
  await client.end()
}

async function deleteQueues (prefix: string, names: readonly string[]): Promise<void> {
  const connection = await connect(RABBITMQ_URL)
  const channel = await connection.createChannel()
  for (const queue of names.flatMap(name => [`${prefix}.${name}`, `${prefix}.${name}.dead`])) await channel.deleteQueue(queue)
  await Promise.all(waitsOf(prefix).flatMap(name => [channel.deleteQueue(name), channel.deleteExchange(name)]))
  await connection.close()
}

export function quantile (values: readonly number[], share: number): number {
  return values.toSorted((a, b) => a - b)[Math.min(Math.floor(values.length * share), values.length - 1)] ?? NaN
}

function show (ratios: readonly number[]): string {
  return `${median(ratios).toFixed(2)} (${Math.min(...ratios).toFixed(2)} to ${Math.max(...ratios).toFixed(2)})`
}
