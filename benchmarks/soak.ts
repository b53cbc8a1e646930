/**
 * Holds a mixed load on a server for a while (`npm run soak -- --seconds 60 --clients 40`), ends it by SIGTERM in the
 * middle and starts it again, and then compares what `addTask` took with what ran or was named: a difference is an error. With `--step 600`
 * the clients pause each 600 seconds, and it prints what the server holds then.
 */
import { fork, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { useServer, type Counts } from './soak-clients.js'

const { values } = parseArgs({
  options: { seconds: { type: 'string', default: '60' }, clients: { type: 'string', default: '40' }, step: { type: 'string' } }
})

const folder = mkdtempSync(join(tmpdir(), 'soak-'))
const record = join(folder, 'record')
let ports: readonly [number, number] | undefined

async function start (generation: number): Promise<ChildProcess> {
  const path = fileURLToPath(new URL('processes/soak-server.js', import.meta.url))
  const server = fork(path, [record, String(generation)], { execArgv: ['--expose-gc'] })
  const [message] = await once(server, 'message')
  ports = message as [number, number]
  return server
}

/** Holds the load on a server for half of the time. */
async function hold (server: ChildProcess): Promise<void> {
  const from = performance.now()
  for (let left = half; left > 0; left = half - (performance.now() - from)) {
    await sleep(Math.min(left, step))
    if (step < half) await printUsage(server)
  }
}

async function printUsage (server: ChildProcess): Promise<void> {
  const paused = ports
  ports = undefined
  // The connections end with the requests that are under way.
  while (counts.busy > 0) await sleep(50)
  await sleep(500)
  const answer = once(server, 'message')
  server.send('usage')
  const [{ heap, handles }] = await answer as [{ heap: number, handles: number }]
  console.log(`${counts.requests} requests: ${(heap / 2 ** 20).toFixed(2)} MiB of heap, ${handles} handles`)
  ports = paused
}

/** The clients go on while the server drains: what they meet is a closed door. */
async function stop (server: ChildProcess): Promise<void> {
  const startedAt = performance.now()
  if (server.exitCode !== null) return
  const exit = once(server, 'exit')
  server.kill('SIGTERM')
  await exit
  ports = undefined
  console.log(`Server ended ${Math.round(performance.now() - startedAt)} ms after SIGTERM`)
}

const half = Number(values.seconds) * 500
const step = values.step === undefined ? Infinity : Number(values.step) * 1_000
const counts: Counts = { requests: 0, replied: 0, hungUp: 0, lost: 0, hanging: 0, busy: 0 }
const over = new AbortController()
let server = await start(1)
const clients = Array.from({ length: Number(values.clients) }, () => useServer(() => ports, counts, over.signal))
await hold(server)
await stop(server)
server = await start(2)
await hold(server)
await stop(server)
over.abort()
await Promise.all(clients)

const lines = readFileSync(record, 'utf8').split('\n')
const found = new Map<string, string[]>()
for (const line of lines) {
  const space = line.indexOf(' ')
  const what = line.slice(0, space)
  const ids = found.get(what)
  if (ids === undefined) found.set(what, [line.slice(space + 1)])
  else ids.push(line.slice(space + 1))
}
const idsOf = (what: string): string[] => found.get(what) ?? []

const accepted = new Set(idsOf('accepted'))
const ran = new Set(idsOf('ran'))
const skipped = new Set(idsOf('skipped'))
const abandoned = new Set([...idsOf('abandoned'), ...idsOf('late')])
const slow = new Set(idsOf('slow'))

console.log('Requests', counts)
console.log('Tasks', { accepted: accepted.size, ran: ran.size, skipped: skipped.size, abandoned: abandoned.size, late: idsOf('late').length })

const problems: Record<string, readonly string[]> = {
  'neither ran nor were named': [...accepted].filter(id => !ran.has(id) && !skipped.has(id) && !abandoned.has(id)),
  'ran and were named as skipped': [...skipped].filter(id => ran.has(id)),
  'ran more than once': duplicates(idsOf('ran')),
  'were named more than once': duplicates([...idsOf('skipped'), ...idsOf('abandoned')]),
  'were abandoned, on lists that nothing held up': idsOf('abandoned').filter(isNotHeldUp),
  'ran long after they were added, on lists that nothing held up': idsOf('overdue').filter(isNotHeldUp),
  'were not known': [...ran, ...skipped, ...abandoned].filter(id => !accepted.has(id)),
  'log lines or counts were not expected': idsOf('unexpected'),
  'ends of the server were not clean': idsOf('exit').length === 2 ? idsOf('exit').filter(code => code !== '0') : idsOf('exit'),
  'requests hung': counts.hanging > 0 ? [String(counts.hanging)] : []
}
let failed = false
for (const [what, ids] of Object.entries(problems)) {
  if (ids.length === 0) continue
  failed = true
  console.error(`ERROR: ${ids.length} ${what}: ${ids.slice(0, 20).join(', ')}`)
}
if (failed) {
  console.error(`The record is ${record}`)
  process.exitCode = 1
} else {
  rmSync(folder, { recursive: true })
  console.log('Every task that was accepted ran, or was named as skipped or abandoned.')
}

function isNotHeldUp (id: string): boolean {
  return !slow.has(id.slice(0, id.lastIndexOf('-')))
}

function duplicates (ids: readonly string[]): string[] {
  const seen = new Set<string>()
  return ids.filter(id => seen.size === seen.add(id).size)
}
