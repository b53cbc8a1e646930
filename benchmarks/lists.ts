import { Child } from './child.js'
import { median, printHeading, printRow } from './report.js'

/** Nanoseconds for one task; the pauses of the collector are in neither of the other two. */
interface Cost {
  readonly add: number
  readonly run: number
  readonly pauses: number
}

type Kind = 'sync' | 'plain' | 'async' | 'asyncLoop' | 'immediate' | 'immediateLoop'

const SIZES = [1_000, 10_000, 100_000, 1_000_000]
const SYNC_LIMIT = 200
const CONSTANT_LIMIT = 1.3
const LOOP_LIMIT = 1.5

/** What a task costs in lists of any length, without HTTP. */
export async function benchLists (processes: number): Promise<void> {
  printHeading(`Nanoseconds for one task of a list: median of ${processes} processes (pauses: the garbage collector's)`)
  await benchSizes(processes)
  await benchAsync(processes, 'async', 'async functions that never wait', 10_000)
  await benchAsync(processes, 'immediate', 'functions that wait for a setImmediate', 10_000)
}

async function benchSizes (processes: number): Promise<void> {
  const totals: number[] = []
  for (const size of SIZES) {
    const task = await costOf('sync', size, processes)
    const total = task.add + task.run
    totals.push(total)
    printRow({
      what: `synchronous, list of ${size}`,
      figure: `${show(total)} (add ${show(task.add)}, run ${show(task.run)}; pauses ${show(task.pauses)})`,
      limit: `< ${SYNC_LIMIT}`,
      met: total < SYNC_LIMIT
    })
  }
  const spread = Math.max(...totals) / Math.min(...totals)
  printRow({
    what: 'synchronous, slowest size / fastest size, without pauses',
    figure: spread.toFixed(2),
    limit: `<= ${CONSTANT_LIMIT}`,
    met: spread <= CONSTANT_LIMIT
  })
  for (const size of SIZES) {
    const { add, run, pauses } = await costOf('plain', size, processes)
    printRow({
      what: `for comparison: array of { fn, args }, length ${size}`,
      figure: `${show(add + run)} (add ${show(add)}, run ${show(run)}; pauses ${show(pauses)})`
    })
  }
}

async function benchAsync (processes: number, kind: 'async' | 'immediate', what: string, size: number): Promise<void> {
  const list = await costOf(kind, size, processes)
  const loop = await costOf(`${kind}Loop`, size, processes)
  const ratio = list.run / loop.run
  printRow({
    what: `${what}: run / for ... await loop`,
    figure: `${ratio.toFixed(2)} (${show(list.run)} / ${show(loop.run)}; with add ${((list.run + list.add) / loop.run).toFixed(2)})`,
    limit: `<= ${LOOP_LIMIT}`,
    met: ratio <= LOOP_LIMIT
  })
}

async function costOf (kind: Kind, size: number, processes: number): Promise<Cost> {
  const costs: Cost[] = []
  for (let i = 0; i < processes; i++) {
    const child = await Child.start<Cost>('lists.js', [kind, String(size)])
    costs.push(child.ready)
    await child.stop()
  }
  const medianOf = (part: keyof Cost): number => median(costs.map(cost => cost[part]))
  return { add: medianOf('add'), run: medianOf('run'), pauses: medianOf('pauses') }
}

function show (nanoseconds: number): string {
  return nanoseconds.toFixed(0)
}
