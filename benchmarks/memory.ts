import { Child } from './child.js'
import { abort, Load } from './load.js'
import { printHeading, printRow, slope } from './report.js'

const SAMPLES = 10

/** What is left behind, in bytes of heap for one request: a leaked object would be at least 16. */
const LIMIT = 1

/** What a pending task takes: `heap.js`. */
interface TaskHeap {
  readonly bytes: number
  readonly fields: Readonly<Record<string, number>>
}

/** The heap of a pending task, and what its fields take of it. */
export async function benchHeap (): Promise<void> {
  printHeading('Bytes of heap for a pending task with one argument (numbered fields: boxed numbers)')
  const child = await Child.start<TaskHeap>('heap.js', [], ['--expose-gc'])
  const { bytes, fields } = child.ready
  await child.stop()
  printRow({ what: 'in all', figure: bytes.toFixed(0) })
  const named = Object.entries(fields).filter(([, size]) => size >= 1)
  for (const [field, size] of named) printRow({ what: `  ${field}`, figure: size.toFixed(0) })
  const rest = named.reduce((left, [, size]) => left - size, bytes)
  printRow({ what: '  its place in the list, and the rest', figure: rest.toFixed(0) })
}

/** The heap of a server after each of many requests with one task: flat. */
export async function benchMemory (): Promise<void> {
  printHeading('Heap after requests with one task each, collected: slope over the samples')
  await sample('answered', 'tasks', 1_000_000, async (port, requests) => {
    const load = await Load.connect(port, 20)
    await load.run(requests)
    load.close()
  })
  await sample('aborted', 'aborted', 100_000, async (port, requests) => {
    await Promise.all(Array.from({ length: 50 }, async () => {
      for (let i = 0; i < requests / 50; i++) await abort(port)
    }))
  })
}

async function sample (
  what: string, kind: string, requests: number, send: (port: number, requests: number) => Promise<void>
): Promise<void> {
  const server = await Child.start<number>('servers.js', [kind, '1', 'silent'], ['--expose-gc'])
  // What is compiled and cached once is no leak.
  const warmUp = requests / SAMPLES
  await send(server.ready, warmUp)
  const points: Array<[requests: number, heapUsed: number]> = [[0, await server.ask('heap') as number]]
  for (let i = 1; i <= SAMPLES; i++) {
    await send(server.ready, requests / SAMPLES)
    points.push([i * requests / SAMPLES, await server.ask('heap') as number])
  }
  const ran = await server.ask('ran')
  await server.stop()
  if (ran !== requests + warmUp) throw new Error(`${ran} tasks ran in place of ${requests + warmUp}`)

  const perRequest = slope(points)
  const megabytes = points.map(([, heapUsed]) => (heapUsed / 2 ** 20).toFixed(2))
  printRow({
    what: `${requests} requests, ${what}`,
    figure: `${perRequest.toFixed(2)} bytes per request`,
    limit: `<= ${LIMIT}`,
    met: perRequest <= LIMIT
  })
  printRow({ what: '  MiB', figure: megabytes.join(' ') })
}
