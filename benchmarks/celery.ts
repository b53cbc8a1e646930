import { randomUUID } from 'node:crypto'
import { existsSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { Child } from './child.js'
import { inPlaces, rateOf, startEngine } from './engines.js'
import { median, printHeading, printRow } from './report.js'

const JOBS = 10_000
const WARM_UP = 2_000

/** The plugin on Redis, in one process, against Celery on Redis, in two. It needs Debian's packages python3-celery and python3-redis. */
export async function benchCelery (rounds: number): Promise<void> {
  printHeading(`Celery: median of ${rounds} alternating rounds (range)`)
  if (!existsSync('/usr/lib/python3/dist-packages/celery')) {
    printRow({ what: 'Celery on Redis', figure: 'skipped: apt-get install python3-celery python3-redis' })
    return
  }
  const found: Record<'plugin' | 'celery', { stored: number[], run: number[] }> = { plugin: { stored: [], run: [] }, celery: { stored: [], run: [] } }
  for (let round = 0; round < rounds; round++) {
    for (const side of round % 2 === 0 ? ['plugin', 'celery'] as const : ['celery', 'plugin'] as const) {
      const { stored, run } = side === 'plugin' ? await ofPlugin() : await ofCelery()
      found[side].stored.push(stored)
      found[side].run.push(run)
    }
  }
  const { plugin, celery } = found
  for (const [what, of] of [['stored one by one', 'stored'], ['run', 'run']] as const) {
    printRow({ what: `jobs/s ${what}, plugin / Celery`, figure: `${median(plugin[of]).toFixed(0)} / ${median(celery[of]).toFixed(0)}` })
  }
}

async function ofPlugin (): Promise<{ stored: number, run: number }> {
  let [stored, run] = [NaN, NaN]
  await inPlaces('bullmq', async ([place = '']) => {
    const web = await startEngine<number>('bullmq', 'plugin', 'web', place)
    stored = await storeRate(web)
    await web.stop()
    const worker = await startEngine<null>('bullmq', 'plugin', 'worker', place)
    run = await rateOf([worker], WARM_UP, JOBS)
    await worker.stop()
  })
  return { stored, run }
}

async function ofCelery (): Promise<{ stored: number, run: number }> {
  const child = await Child.start<null>('ways/celery_app.py', [], [], { BENCH_PREFIX: `fbt_bench_${randomUUID().slice(0, 8)}` })
  const stored = await storeRate(child)
  await child.ask('drain')
  const ran = async (): Promise<number> => await child.ask('ran') as number
  while (await ran() < WARM_UP) await sleep(5)
  const [first, from] = [await ran(), performance.now()]
  while (await ran() < WARM_UP + JOBS) await sleep(20)
  const run = (WARM_UP + JOBS - first) / (performance.now() - from) * 1_000
  await child.ask('end')
  await child.stop()
  return { stored, run }
}

async function storeRate (child: Child<unknown>): Promise<number> {
  await child.ask(`store ${WARM_UP}`)
  const from = performance.now()
  await child.ask(`store ${JOBS}`)
  return JOBS / (performance.now() - from) * 1_000
}
