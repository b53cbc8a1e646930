import { compare, type Kind, type Server } from './paired.js'
import { printHeading, printRow } from './report.js'

interface Compared {
  readonly what: string
  readonly kinds: readonly [Kind, Kind]
  readonly tasks: number
  readonly limit?: number
}

const COMPARED: readonly Compared[] = [
  { what: 'control: the no-op hook twice', kinds: ['hook', 'hook'], tasks: 0 },
  { what: 'plugin, no task / no-op hook', kinds: ['unused', 'hook'], tasks: 0, limit: 1.01 },
  { what: 'one task / no-op hook', kinds: ['tasks', 'hook'], tasks: 1, limit: 1.03 },
  { what: 'one task / written by hand', kinds: ['tasks', 'hand'], tasks: 1, limit: 0.98 },
  { what: 'one task, with an engine / without one', kinds: ['engine', 'tasks'], tasks: 1 },
  { what: 'no task, ambient / not ambient', kinds: ['unused-ambient', 'unused'], tasks: 0 },
  { what: 'one task, ambient / request.backgroundTasks', kinds: ['ambient', 'tasks'], tasks: 1, limit: 1.06 },
  { what: 'one task, ambient / by hand with @fastify/request-context', kinds: ['ambient', 'context'], tasks: 1, limit: 1 },
  { what: 'ten tasks / no-op hook', kinds: ['tasks', 'hook'], tasks: 10 },
  { what: 'ten tasks / written by hand', kinds: ['tasks', 'hand'], tasks: 10 }
]

/** What a request costs more, in CPU time of the server process. */
export async function benchRequests (pairs: number, rounds: number): Promise<void> {
  printHeading(`CPU time per request: median of ${rounds} rounds on each of ${pairs} pairs of processes (range of the pairs)`)
  for (const logger of [false, true]) {
    for (const { what, kinds, tasks, limit } of COMPARED) {
      const [a, b] = kinds.map((kind): Server => ({ kind, tasks, logger })) as [Server, Server]
      const { ratio, range, micros } = await compare(a, b, pairs, rounds)
      const figure = `${ratio.toFixed(3)} (${range.map(value => value.toFixed(3)).join(' to ')}), ` +
        micros.map(value => value.toFixed(1)).join(' / ') + ' µs'
      const checked = limit !== undefined && !logger ? { limit: `<= ${limit.toFixed(2)}`, met: ratio <= limit } : {}
      printRow({ what: logger ? `${what}, with a logger` : what, figure, ...checked })
    }
  }
}
