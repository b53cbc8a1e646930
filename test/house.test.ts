/**
 * The house: `lib` is a tower of rooms, each of which imports only rooms below it. Type-only imports count, too: what a file has to know is
 * what its reader has to know. See docs/architecture.md.
 */
import { readdirSync, readFileSync } from 'node:fs'
import { dirname, join, posix } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'

const lib = fileURLToPath(new URL('../lib', import.meta.url))

/** From the top down. Rooms of one floor do not know each other. */
const FLOORS: ReadonlyArray<readonly string[]> = [
  ['testing.ts', 'ambient.ts', 'routes.ts'],
  ['routes'],
  ['index.ts'],
  ['options.ts', 'drain.ts'],
  ['decorators'],
  ['dispatch'],
  ['runner'],
  ['definitions'],
  ['tasks', 'engines/bullmq', 'engines/pg-boss', 'engines/rabbitmq'],
  ['engines', 'exchange'],
  ['limits.ts', 'rules.ts', 'instances.ts'],
  ['errors.ts', 'queue.ts', 'timers.ts'],
  ['foreign.ts', 'current-request.ts']
]

const MAX_LINES = 300

const files = readdirSync(lib, { recursive: true, encoding: 'utf8' })
  .map(name => name.split('\\').join('/'))
  .filter(name => name.endsWith('.ts') && !name.startsWith('commonjs/'))

const sources = new Map(files.map(file => [file, readFileSync(join(lib, file), 'utf8')]))

/** What each file imports or re-exports of `lib`. */
const imports = new Map(Array.from(sources, ([file, source]) => [
  file,
  Array.from(source.matchAll(/\b(?:from|import\() *'(\.[^']+)\.js'/g), ([, path = '']) => `${posix.join(posix.dirname(file), path)}.ts`)
]))

const roomOf = (file: string): string => dirname(file) === '.' ? file : dirname(file)
const floorOf = (file: string): number => FLOORS.findIndex(rooms => rooms.includes(roomOf(file)))

/** The members of circles: whatever is left when all that import nothing, or only what was taken away before, are taken away. */
function circles (graph: ReadonlyMap<string, readonly string[]>): string[] {
  const left = new Map(graph)
  for (let before = -1; before !== left.size;) {
    before = left.size
    for (const [node, targets] of left) if (!targets.some(target => target !== node && left.has(target))) left.delete(node)
  }
  return [...left.keys()]
}

t.test('each file of lib has a room', async t => {
  t.same(files.filter(file => floorOf(file) === -1), [])
  t.same([...imports.values()].flat().filter(target => !sources.has(target)), [], 'all that is imported is there')
  t.ok(files.length > 50 && [...imports.values()].flat().length > 150, 'imports are found')
})

t.test('each room imports only rooms below it', async t => {
  const wrong = Array.from(imports, ([file, targets]) => targets
    .filter(target => roomOf(target) !== roomOf(file) && floorOf(target) <= floorOf(file))
    .map(target => `${file} imports ${target}`))
  t.same(wrong.flat(), [])
})

t.test('no files import each other in a circle', async t => {
  t.same(circles(imports), [])
  t.same(circles(new Map([['a', ['b']], ['b', ['c']], ['c', ['b']], ['d', []]])), ['a', 'b', 'c'], 'a circle is found')
})

t.test(`no file of lib is longer than ${MAX_LINES} lines`, async t => {
  t.same(files.filter(file => (sources.get(file) ?? '').split('\n').length - 1 > MAX_LINES), [])
})
