import { randomUUID } from 'node:crypto'
import { setTimeout as sleep } from 'node:timers/promises'
import { connect } from 'amqplib'
import { Redis } from 'ioredis'
import pg from 'pg'
import { Child } from './child.js'
import { Load } from './load.js'
import { median, printHeading, printRow } from './report.js'

type Engine = 'bullmq' | 'pg-boss' | 'rabbitmq'
type Way = 'plugin' | 'library' | 'notify' | 'best'
type Role = 'web' | 'worker' | 'latency'

const CLIENTS = 50
/** In turns with the other side: the machine changes its speed within seconds. */
const SLICES = 4
const JOBS = 20_000
/** Jobs, or requests, before anything is measured: V8 interprets at first. */
const WARM_UP = 10_000

const { REDIS_URL = 'redis://127.0.0.1:6379', POSTGRES_URL = 'postgres://postgres@127.0.0.1:5432/test', RABBITMQ_URL = 'amqp://guest:guest@127.0.0.1:5672' } = process.env

/** The plugin on an engine against its library alone. */
export async function benchEngines (rounds: number): Promise<void> {
  printHeading(`Engines: median of ${rounds} alternating rounds (range)`)
  await benchRequests('bullmq', 'library', 'awaited in the handler', rounds, 0.95, 1.05)
  await benchRequests('pg-boss', 'library', 'awaited in the handler', rounds, 8, undefined)
  await benchRequests('pg-boss', 'notify', 'awaited, queue with NOTIFY', rounds, 8, undefined)
  await benchRequests('rabbitmq', 'library', 'awaited in the handler', rounds, 0.95, 1.05)
  await benchDrain('bullmq', 'library', 'the library\'s Worker', rounds, 0.95)
  await benchDrain('pg-boss', 'library', 'work() at its defaults', rounds, 4)
  await benchDrain('pg-boss', 'best', 'work() at its best settings', rounds, 1.5)
  await benchDrain('rabbitmq', 'library', 'a consumer of the client', rounds, 0.95)
  for (const engine of ['bullmq', 'pg-boss', 'rabbitmq'] as const) await benchLatency(engine, rounds)
  for (const engine of ['bullmq', 'pg-boss', 'rabbitmq'] as const) await benchWorkers(engine)
}

/** Requests per second of a route that adds one task, and what a request costs the process. */
async function benchRequests (engine: Engine, against: Way, what: string, rounds: number, limit: number, cpuLimit: number | undefined): Promise<void> {
  const rates: number[] = []
  const cpus: number[] = []
  const sides: Record<string, { rate: number, cpu: number }[]> = { plugin: [], [against]: [] }
  // Fresh processes each round: two of one program differ by some percent as long as they live.
  for (let round = 0; round < rounds; round++) {
    await inPlaces(engine, async places => {
      const ways: Way[] = ['plugin', against]
      const servers = await Promise.all(ways.map(async (way, i) => {
        const child = await start<number>(engine, way, 'web', places[i] ?? '')
        const requests = engine !== 'pg-boss' || way === 'plugin' ? 2_000 : 400
        return { way, child, requests, load: await Load.connect(child.ready, CLIENTS), ms: 0, micros: 0 }
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
  const ratio = median(rates)
  printRow({ what: `${engine}: requests/s, plugin / ${what}`, figure: `${show(rates)}, ${of('plugin', 'rate')} / ${of(against, 'rate')}`, limit: `>= ${limit}`, met: ratio >= limit })
  printRow({
    what: `${engine}: CPU per request`,
    figure: `${show(cpus)}, ${of('plugin', 'cpu')} / ${of(against, 'cpu')} µs`,
    ...cpuLimit !== undefined && { limit: `<= ${cpuLimit}`, met: median(cpus) <= cpuLimit }
  })
}

/** Jobs per second of one process that runs 20,000 of them, behind those that warm it up. */
async function benchDrain (engine: Engine, against: Way, what: string, rounds: number, limit: number): Promise<void> {
  const ratios: number[] = []
  const rates: Record<string, number[]> = { plugin: [], [against]: [] }
  for (let round = 0; round < rounds; round++) {
    const rate: Record<string, number> = {}
    const ways: Way[] = round % 2 === 0 ? ['plugin', against] : [against, 'plugin']
    for (const way of ways) {
      // At its defaults the library runs one job every two seconds or so.
      rate[way] = engine === 'pg-boss' && way === 'library' ? await drainRate(engine, way, 0, 20, 1) : await drainRate(engine, way, WARM_UP, JOBS, 1)
      rates[way]?.push(rate[way])
    }
    ratios.push((rate['plugin'] ?? NaN) / (rate[against] ?? NaN))
  }
  printRow({
    what: `${engine}: drain, plugin / ${what}`,
    figure: `${show(ratios)}, ${median(rates['plugin'] ?? []).toFixed(0)} / ${median(rates[against] ?? []).toFixed(0)} jobs/s`,
    limit: `>= ${limit}`,
    met: median(ratios) >= limit
  })
}

async function drainRate (engine: Engine, way: Way, before: number, jobs: number, processes: number): Promise<number> {
  let rate = NaN
  await inPlaces(engine, async ([place = '']) => {
    const filler = await start<number>(engine, way === 'plugin' ? 'plugin' : 'library', 'web', place)
    await filler.ask(`fill ${before + jobs}`)
    await filler.stop()
    const workers = await Promise.all(Array.from({ length: processes }, async () => await start<null>(engine, way, 'worker', place)))
    const ran = async (): Promise<number> => (await Promise.all(workers.map(async worker => await worker.ask('ran') as number))).reduce((sum, n) => sum + n, 0)
    let first = 0
    let from = performance.now()
    await Promise.all(workers.map(async worker => await worker.ask('drain')))
    while (first < before) {
      await sleep(5)
      first = await ran()
      from = performance.now()
    }
    while (await ran() < before + jobs) await sleep(5)
    rate = (before + jobs - first) / (performance.now() - from) * 1_000
    for (const worker of workers) await worker.stop()
  })
  return rate
}

/** Milliseconds from the receipt to the start of a job, on an idle worker. */
async function benchLatency (engine: Engine, rounds: number): Promise<void> {
  const waits: Record<string, number[]> = { plugin: [], library: [] }
  await inPlaces(engine, async places => {
    const children = await Promise.all((['plugin', 'library'] as const).map(async (way, i) => ({ way, child: await start<null>(engine, way, 'latency', places[i] ?? '') })))
    // At its defaults pg-boss polls every two seconds.
    const isSlow = (way: Way): boolean => engine === 'pg-boss' && way === 'library'
    const jobs = (way: Way): number => isSlow(way) ? 10 : 100
    for (const { way, child } of children) {
      if (!isSlow(way)) await warmUp(child)
      await child.ask('latency 5')
    }
    for (let round = 0; round < rounds; round++) {
      for (const { way, child } of children) waits[way]?.push(...await child.ask(`latency ${jobs(way)}`) as number[])
    }
    for (const { child } of children) await child.stop()
  })
  for (const [name, share] of [['p50', 0.5], ['p99', 0.99]] as const) {
    const [plugin = NaN, library = NaN] = ['plugin', 'library'].map(way => quantile(waits[way] ?? [], share))
    printRow({
      what: `${engine}: latency from stored to started, ${name}`,
      figure: `${(plugin / library).toFixed(2)}, ${plugin.toFixed(2)} / ${library.toFixed(2)} ms`,
      limit: '<= 1.1',
      met: plugin / library <= 1.1
    })
  }
}

/** As a process is that has been at work for a while: V8 interprets at first. */
async function warmUp (child: Child<null>): Promise<void> {
  await child.ask(`fill ${WARM_UP}`)
  while (await child.ask('ran') as number < WARM_UP) await sleep(20)
}

async function benchWorkers (engine: Engine): Promise<void> {
  const rates: string[] = []
  for (const processes of [1, 2, 4]) rates.push((await drainRate(engine, 'plugin', processes * WARM_UP, JOBS, processes)).toFixed(0))
  printRow({ what: `${engine}: drain by one, two, four processes`, figure: `${rates.join(', ')} jobs/s` })
}

async function start<Ready> (engine: Engine, way: Way, role: Role, place: string): Promise<Child<Ready>> {
  return await Child.start<Ready>('engine-process.js', [engine, way, role, place])
}

/** Two places of their own, which are gone afterwards. */
async function inPlaces (engine: Engine, use: (places: string[]) => Promise<void>): Promise<void> {
  const places = Array.from({ length: 2 }, () => `fbt_bench_${randomUUID().slice(0, 8)}`)
  try {
    await use(places)
  } finally {
    const remove = { bullmq: removeKeys, 'pg-boss': dropSchema, rabbitmq: deleteQueues }[engine]
    await Promise.all(places.map(remove))
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

async function deleteQueues (prefix: string): Promise<void> {
  const connection = await connect(RABBITMQ_URL)
  const channel = await connection.createChannel()
  for (const queue of [`${prefix}.bench`, `${prefix}.bench.dead`]) await channel.deleteQueue(queue)
  await connection.close()
}

function quantile (values: readonly number[], share: number): number {
  return values.toSorted((a, b) => a - b)[Math.min(Math.floor(values.length * share), values.length - 1)] ?? NaN
}

function show (ratios: readonly number[]): string {
  return `${median(ratios).toFixed(2)} (${Math.min(...ratios).toFixed(2)} to ${Math.max(...ratios).toFixed(2)})`
}
