import { setTimeout as sleep } from 'node:timers/promises'
import pg from 'pg'
import { inPlaces, POSTGRES_URL, quantile, startEngine, type Engine } from './engines.js'
import { printHeading, printRow } from './report.js'

const JOBS = 100_000

/** What an operator's questions cost where there are many jobs. */
export async function benchOperating (): Promise<void> {
  printHeading(`Operating ${JOBS.toLocaleString('en')} jobs: p50 in milliseconds (first call, highest)`)
  for (const engine of ['bullmq', 'pg-boss', 'rabbitmq'] as const) await benchEngine(engine)
}

async function benchEngine (engine: Engine): Promise<void> {
  await inPlaces(engine, async ([place = '']) => {
    const web = await startEngine<number>(engine, 'plugin', 'web', place)
    await web.ask(`fill ${JOBS}`)
    if (engine === 'pg-boss') await vacuum(place)
    print(`${engine}: count, all wait`, await web.ask('count 50') as number[], 5)
    if (engine !== 'rabbitmq') {
      const worker = await startEngine<null>(engine, 'plugin', 'worker', place, { BENCH_FAILS: '1' })
      await worker.ask('drain')
      while (await worker.ask('ran') as number < JOBS) await sleep(500)
      await sleep(2_000)
      if (engine === 'pg-boss') await vacuum(place)
      print(`${engine}: find, 50 of them, all have failed`, await web.ask('find 50') as number[], 50)
      await worker.stop()
    }
    await web.stop()
  })
}

/** As the server does itself within a minute. Until then it does not know how many jobs there are. */
async function vacuum (schema: string): Promise<void> {
  const client = new pg.Client({ connectionString: POSTGRES_URL })
  await client.connect()
  await client.query(`vacuum analyze ${schema}.job`)
  await client.end()
}

function print (what: string, times: readonly number[], limit: number): void {
  const p50 = quantile(times, 0.5)
  const figure = `${p50.toFixed(1)} (${(times[0] ?? NaN).toFixed(1)}, ${Math.max(...times).toFixed(1)})`
  printRow({ what, figure, limit: `< ${limit}`, met: p50 < limit })
}
