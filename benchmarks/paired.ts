import { Child } from './child.js'
import { Load } from './load.js'
import { median } from './report.js'

const WARM_UP = 20_000
/** Long rounds drown in what else the machine does. */
const REQUESTS = 3_000

export type Kind = 'hook' | 'hand' | 'unused' | 'tasks' | 'engine' | 'ambient' | 'unused-ambient' | 'context'

/** Those whose route adds no task. */
const ADD_NOTHING: readonly Kind[] = ['hook', 'unused', 'unused-ambient']

/** What of `servers.js` is measured. */
export interface Server {
  readonly kind: Kind
  readonly tasks: number
  readonly logger: boolean
}

export interface Comparison {
  /** Median over all rounds of the CPU time of the first server by that of the second. */
  readonly ratio: number
  /** The lowest and the highest median of one pair of processes: what two identical servers can differ by. */
  readonly range: readonly [number, number]
  /** Microseconds of CPU time for one request, median. */
  readonly micros: readonly [number, number]
}

/**
 * Compares the CPU time of two servers by alternating rounds. Two processes of the same program differ by some percent as
 * long as they live (compiled code, memory layout), hence the fresh pairs.
 */
export async function compare (a: Server, b: Server, pairs: number, rounds: number): Promise<Comparison> {
  const costs: Array<[number, number]> = []
  const medians: number[] = []
  for (let pair = 0; pair < pairs; pair++) {
    const ofPair = await (pair % 2 === 0 ? measurePair(a, b, rounds) : measurePair(b, a, rounds).then(swapped))
    costs.push(...ofPair)
    medians.push(median(ofPair.map(ratioOf)))
  }
  return {
    ratio: median(costs.map(ratioOf)),
    range: [Math.min(...medians), Math.max(...medians)],
    micros: [median(costs.map(cost => cost[0])), median(costs.map(cost => cost[1]))]
  }
}

const ratioOf = ([a, b]: [number, number]): number => a / b
const swapped = (costs: Array<[number, number]>): Array<[number, number]> => costs.map(([a, b]) => [b, a])

async function measurePair (a: Server, b: Server, rounds: number): Promise<Array<[number, number]>> {
  const first = await Measured.start(a)
  const second = await Measured.start(b)
  const costs: Array<[number, number]> = []
  for (let round = 0; round < rounds; round++) {
    // A B, B A: what drifts with time weighs on both.
    if (round % 2 === 0) {
      const cost = await first.round()
      costs.push([cost, await second.round()])
    } else {
      const cost = await second.round()
      costs.push([await first.round(), cost])
    }
  }
  await first.stop()
  await second.stop()
  return costs
}

class Measured {
  readonly #server: Server
  readonly #child: Child<number>
  readonly #load: Load
  #requests = 0

  private constructor (server: Server, child: Child<number>, load: Load) {
    this.#server = server
    this.#child = child
    this.#load = load
  }

  static async start (server: Server): Promise<Measured> {
    const { kind, tasks, logger } = server
    const child = await Child.start<number>('servers.js', [kind, String(tasks), logger ? 'logger' : 'silent'])
    const measured = new Measured(server, child, await Load.connect(child.ready))
    await measured.#run(WARM_UP)
    return measured
  }

  /** Microseconds of CPU time for one request, as the operating system counts it for the whole process. */
  async round (): Promise<number> {
    const before = await this.#child.ask('cpu') as number
    await this.#run(REQUESTS)
    const after = await this.#child.ask('cpu') as number
    return (after - before) / REQUESTS
  }

  async stop (): Promise<void> {
    const { kind, tasks } = this.#server
    const ran = await this.#child.ask('ran')
    const expected = ADD_NOTHING.includes(kind) ? 0 : this.#requests * tasks
    this.#load.close()
    await this.#child.stop()
    if (ran !== expected) throw new Error(`${kind} ran ${ran} tasks in place of ${expected}: its figures mean nothing`)
  }

  async #run (requests: number): Promise<void> {
    this.#requests += requests
    await this.#load.run(requests)
  }
}
