import { canRun, inPlaces, quantile, startEngine, WHAT, type Engine, type Way } from './engines.js'
import { printHeading, printRow } from './report.js'

/** Requests that wait for a result at the same time. */
const WAITING = [1, 10, 50, 100]
/** Results of one figure, at least. */
const RESULTS = 1_000

const WAYS: ReadonlyArray<readonly [Engine, readonly Way[]]> = [
  ['bullmq', ['plugin', 'bare', 'job-queue']],
  ['pg-boss', ['plugin']]
]

/** Milliseconds from the call that stores a task to its result, where an idle worker in another process runs it. */
export async function benchResults (): Promise<void> {
  printHeading('Results that are waited for: p50 / p99 in milliseconds, at 1, 10, 50 and 100 waiting')
  for (const [engine, ways] of WAYS) {
    for (const way of ways.filter(against => canRun({ engine, against }))) await benchWay(engine, way)
  }
}

async function benchWay (engine: Engine, way: Way): Promise<void> {
  await inPlaces(engine, async ([place = '']) => {
    const web = await startEngine<number>(engine, way, 'web', place)
    const worker = await startEngine<null>(engine, way, 'worker', place)
    await worker.ask('drain')
    await web.ask('wait 50 40')
    const figures: string[] = []
    for (const waiting of WAITING) {
      const waits = await web.ask(`wait ${waiting} ${RESULTS / waiting}`) as number[]
      figures.push(`${quantile(waits, 0.5).toFixed(1)} / ${quantile(waits, 0.99).toFixed(1)}`)
    }
    await web.stop()
    await worker.stop()
    printRow({ what: `${engine}: ${WHAT[way]}`, figure: figures.join(', ') })
  })
}
