/**
 * What this plugin costs: `npm run bench`, or `npm run bench -- requests lists engines results operating celery delayed scale heap memory` for some of it,
 * with `--rounds` and `--pairs` for the requests and `--processes` for the lists and the rounds of the engines. A report: what is not met is said, and ends
 * with 0.
 */
import { cpus } from 'node:os'
import { parseArgs } from 'node:util'
import { benchEngines } from './engines.js'
import { benchCelery } from './celery.js'
import { benchDelayed } from './delayed.js'
import { benchHeap, benchMemory } from './memory.js'
import { benchLists } from './lists.js'
import { benchOperating } from './operating.js'
import { notMet } from './report.js'
import { benchRequests } from './requests.js'
import { benchResults } from './results.js'
import { benchScale } from './scale.js'

const { values, positionals } = parseArgs({
  options: {
    rounds: { type: 'string', default: '12' },
    pairs: { type: 'string', default: '5' },
    processes: { type: 'string', default: '5' }
  },
  allowPositionals: true
})

const parts: Record<string, () => Promise<void>> = {
  requests: () => benchRequests(Number(values.pairs), Number(values.rounds)),
  lists: () => benchLists(Number(values.processes)),
  engines: () => benchEngines(Number(values.processes)),
  results: benchResults,
  operating: benchOperating,
  celery: () => benchCelery(Number(values.processes)),
  delayed: benchDelayed,
  scale: benchScale,
  heap: benchHeap,
  memory: benchMemory
}

console.log(`Node ${process.versions.node}, ${cpus().length} × ${cpus()[0]?.model ?? 'unknown processor'}`)
const unknown = positionals.filter(name => !Object.hasOwn(parts, name))
if (unknown.length > 0) throw new Error(`No such part: ${unknown.join(', ')}; there are ${Object.keys(parts).join(', ')}`)
for (const [name, bench] of Object.entries(parts)) {
  if (positionals.length === 0 || positionals.includes(name)) await bench()
}
const missed = notMet()
console.log(missed.length === 0 ? '\nEvery limit is met.' : `\nNOT MET:\n${missed.map(what => `  ${what}`).join('\n')}`)
