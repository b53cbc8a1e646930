import { inPlaces, quantile, rateOf, startEngine, warmUp, type Engine } from './engines.js'
import { printHeading, printRow } from './report.js'

const ENGINES = ['bullmq', 'pg-boss', 'rabbitmq'] as const
/** Characters of a payload, and jobs. */
const PAYLOADS = [[1_000, 20_000], [100_000, 2_000], [1_000_000, 200]] as const
const DEFINITIONS = [1, 10, 100]
const WAITING = [1_000, 10_000, 100_000, 1_000_000]
/** Jobs that are stored, or run, where others wait. */
const JOBS = 10_000
/** The most by which one figure may differ from the others, as a ratio. */
const FLAT = 1.3

/** What the size of payloads, the number of definitions, and the number of waiting jobs do to the plugin. */
export async function benchScale (): Promise<void> {
  printHeading('Payloads of 1 kB, 100 kB and 1 MB: jobs/s, stored 500 at once / run by one process')
  for (const engine of ENGINES) {
    const figures: string[] = []
    for (const [size, jobs] of PAYLOADS) figures.push(await storeAndRun(engine, ['bench'], jobs, size))
    printRow({ what: engine, figure: figures.join(', ') })
  }
  printHeading('1, 10 and 100 definitions: jobs/s, stored 500 at once / run by one process')
  for (const engine of ENGINES) {
    const figures: string[] = []
    for (const count of DEFINITIONS) figures.push(await storeAndRun(engine, Array.from({ length: count }, (_, i) => `bench${i}`), 20_000, 150))
    printRow({ what: engine, figure: figures.join(', ') })
  }
  printHeading(`${WAITING.map(count => count.toLocaleString('en')).join(', ')} jobs wait already`)
  for (const engine of ENGINES) await benchWaiting(engine)
}

async function storeAndRun (engine: Engine, names: readonly string[], jobs: number, size: number): Promise<string> {
  const environment = { BENCH_PAYLOAD: String(size), BENCH_TASKS: names.join() }
  const before = jobs / 2
  let figure = ''
  await inPlaces(engine, async ([place = '']) => {
    const web = await startEngine<number>(engine, 'plugin', 'web', place, environment)
    await web.ask(`fill ${before}`)
    const stored = await perSecond(jobs, async () => { await web.ask(`fill ${jobs}`) })
    await web.stop()
    const worker = await startEngine<null>(engine, 'plugin', 'worker', place, environment)
    figure = `${stored.toFixed(0)} / ${(await rateOf([worker], before, jobs)).toFixed(0)}`
    await worker.stop()
  }, names)
  return figure
}

async function benchWaiting (engine: Engine): Promise<void> {
  const found = { 'stored, jobs/s': [] as number[], 'from stored to started of another definition, p50, ms': [] as number[], 'run, jobs/s': [] as number[] }
  for (const count of WAITING) {
    await inPlaces(engine, async ([place = '']) => {
      const web = await startEngine<number>(engine, 'plugin', 'web', place)
      await web.ask(`fill ${count}`)
      // What runs below is stored here, so that as many wait as before.
      found['stored, jobs/s'].push(await perSecond(2 * JOBS, async () => { await web.ask(`fill ${2 * JOBS}`) }))
      await web.stop()
      const other = await startEngine<null>(engine, 'plugin', 'latency', place, { BENCH_TASKS: 'other' })
      await warmUp(other)
      found['from stored to started of another definition, p50, ms'].push(quantile(await other.ask('latency 300') as number[], 0.5))
      await other.stop()
      const worker = await startEngine<null>(engine, 'plugin', 'worker', place)
      found['run, jobs/s'].push(await rateOf([worker], JOBS / 2, JOBS))
      await worker.stop()
    }, ['bench', 'other'])
  }
  for (const [what, values] of Object.entries(found)) {
    const ratio = Math.max(...values) / Math.min(...values)
    const digits = what.endsWith('ms') ? 2 : 0
    printRow({ what: `${engine}: ${what}`, figure: `${values.map(value => value.toFixed(digits)).join(', ')} (${ratio.toFixed(2)})`, limit: `<= ${FLAT}`, met: ratio <= FLAT })
  }
}

async function perSecond (count: number, use: () => Promise<void>): Promise<number> {
  const from = performance.now()
  await use()
  return count / (performance.now() - from) * 1_000
}
