import { inPlaces, quantile, startEngine, WHAT, type Engine, type Way } from './engines.js'
import { printHeading, printRow } from './report.js'

const JOBS = 10_000
/** Milliseconds over which they are due. */
const SPAN = 30_000
/** Jobs that are stored and run each second meanwhile. */
const LOADS = [0, 1_000]

const WAYS: ReadonlyArray<readonly [Engine, readonly Way[]]> = [
  ['bullmq', ['plugin', 'hand']],
  ['pg-boss', ['plugin', 'hand']],
  // The library has no delays.
  ['rabbitmq', ['plugin']]
]

/** How late delayed jobs start. */
export async function benchDelayed (): Promise<void> {
  printHeading(`${JOBS} delayed jobs, due over ${SPAN / 1_000} s: milliseconds from due to started`)
  for (const [engine, ways] of WAYS) {
    for (const load of LOADS) {
      const found: Partial<Record<Way, readonly number[]>> = {}
      for (const way of ways) found[way] = await lateness(engine, way, load)
      const when = load === 0 ? 'idle' : `${load} other jobs/s`
      for (const [name, share] of [['p50', 0.5], ['p99', 0.99]] as const) {
        const [plugin = NaN, hand] = ways.map(way => quantile(found[way] ?? [], share))
        printRow({
          what: `${engine}: ${name}, ${when}, plugin / ${WHAT.hand}`,
          figure: hand === undefined ? `${plugin} ms` : `${(plugin / hand).toFixed(2)}, ${plugin} / ${hand} ms`,
          ...hand !== undefined && { limit: '<= 1.1', met: plugin / hand <= 1.1 }
        })
      }
      const earliest = Math.min(...found.plugin ?? [])
      printRow({ what: `${engine}: the earliest, ${when}`, figure: `${earliest} ms`, limit: '>= 0', met: earliest >= 0 })
    }
  }
}

async function lateness (engine: Engine, way: Way, load: number): Promise<readonly number[]> {
  let late: readonly number[] = []
  await inPlaces(engine, async ([place = '']) => {
    const child = await startEngine<null>(engine, way, 'delayed', place)
    await child.ask('fill 2000')
    late = await child.ask(`delayed ${JOBS} ${SPAN} ${load}`) as number[]
    await child.stop()
  })
  return late
}
