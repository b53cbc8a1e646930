/**
 * The documentation: its code compiles, the whole programs in it run, and its links lead somewhere.
 *
 * A block of `ts` or `js` is a module of its own, which has what the blocks above it on its page declare, and what
 * test/support/docs/globals.d.ts declares for all. What readers need not see is declared in a comment of the page, between lines
 * of `<!-- ts` and `-->`. A block that is a whole program says so, `ts run`, and is run as it stands.
 */
import { execFile } from 'node:child_process'
import { existsSync, writeFileSync } from 'node:fs'
import { join, posix } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'
import { anchorsOf, blocksOf, linksOf, readPage, readPages, type Block, type Page } from './support/docs/pages.js'
import { compile, toProgram, type Complaint } from './support/docs/program.js'

t.setTimeout(120_000)

const root = fileURLToPath(new URL('..', import.meta.url))
const pages = readPages(root, { generated: false })
if (!existsSync(join(root, 'dist', 'plugin.d.ts'))) t.bailout('The documentation uses the package built: npm run build')

/** What is wrong here has to be found, so that the check is known to find anything. */
const WRONG: Page = {
  path: 'docs/wrong.md',
  text: `# Wrong
- In a list:
  ~~~ts
  const list = request.backgroundTasks
  const { length }: { length: string } = list
  ~~~
~~~js
import { backgroundTasks } from 'fastify-background-tasks'
backgroundTasks.add(list.length, length => length)
~~~
~~~js
const plugin = require('fastify-background-tasks')
plugin.nothing(list)
~~~
~~~typescript
~~~
~~~ts later
// @ts-expect-error there is no such task
app.backgroundTasks.addTask(1)
~~~
[here](#wrong) [there](#right) [far](errors.md#wrong) [farther](../lib/wrong.ts) \`[code](wrong.md)\`
<!-- ts
const hidden: number = length
-->
~~~ts
interface Mine { own: 1 }`
}

const complaints: Complaint[] = []
const blocks = [...pages, WRONG].flatMap(page => blocksOf(page, (line, text) => { complaints.push({ page: page.path, line, text }) }))
complaints.push(...compile(root, blocks))

t.test('what is wrong is told by page and line', async t => {
  t.strictSame([...saidOf(WRONG.path), ...deadLinksOf(WRONG)].map(said => said.replace(/ .*(TS\d+).*/s, ' $1')), [
    'docs/wrong.md:15: a block of "typescript" is not checked: say "ts" or "js"',
    'docs/wrong.md:17: "later" behind "ts" means nothing: only "run" does',
    'docs/wrong.md:25: this block of code is never closed',
    'docs/wrong.md:5: TS2322',
    'docs/wrong.md:9: TS2339',
    'docs/wrong.md:13: TS2339',
    'docs/wrong.md:13: TS2304',
    'docs/wrong.md:23: TS2322',
    'docs/wrong.md:21: docs/wrong.md has no heading #right',
    'docs/wrong.md:21: docs/errors.md has no heading #wrong',
    'docs/wrong.md:21: there is no lib/wrong.ts'
  ])
})

t.test('what the blocks share compiles', async t => {
  for (const name of ['globals.d.ts', 'modules.d.ts']) t.strictSame(saidOf(`test/support/docs/${name}`), [], name)
  const declared = readPage(root, 'test/support/docs/modules.d.ts').text.matchAll(/^declare module '(.+)'/gm)
  const installed = Array.from(declared, ([, name]) => name as string).filter(name => existsSync(join(root, 'node_modules', name)))
  t.strictSame(installed, [], 'what is installed brings its own types')
})

for (const { path } of pages) {
  t.test(`the code in ${path} compiles`, async t => {
    const said = saidOf(path)
    const { length } = blocks.filter(({ page }) => page === path)
    t.comment(`${length} blocks`)
    for (const complaint of said) t.fail(complaint, { diagnostic: false })
  })
}

t.test('the programs in the documentation run', { jobs: 2 }, async t => {
  const programs = blocks.filter(({ runs }) => runs)
  t.not(programs.length, 0)
  for (const block of programs) {
    void t.test(`${block.page}:${block.line}`, async t => {
      const failure = await run(t.testdir(), block)
      if (failure !== undefined) t.fail(failure, { diagnostic: false })
    })
  }
})

t.test('links to this repository lead somewhere', async t => {
  for (const page of readPages(root, { generated: true })) t.strictSame(deadLinksOf(page), [], page.path)
})

function saidOf (path: string): string[] {
  return complaints.filter(({ page }) => page === path).map(({ page, line, text }) => `${page}:${line}: ${text}`)
}

function deadLinksOf (page: Page): string[] {
  return linksOf(page).flatMap(link => {
    const path = link.path === '' ? page.path : posix.join(posix.dirname(page.path), link.path)
    const dead = (why: string): string => `${page.path}:${link.line}: ${why}`
    if (path !== page.path && !existsSync(join(root, path))) return dead(`there is no ${path}`)
    if (link.anchor === '' || !path.endsWith('.md')) return []
    const anchors = anchorsOf(path === page.path ? page : readPage(root, path))
    return anchors.has(link.anchor) ? [] : dead(`${path} has no heading #${link.anchor}`)
  })
}

/** @returns what a program said that did not end well */
async function run (folder: string, block: Block): Promise<string | undefined> {
  const { name, text } = toProgram(root, block)
  const file = join(folder, name)
  writeFileSync(file, text)
  const { NODE_OPTIONS: _, ...env } = process.env
  try {
    await promisify(execFile)(process.execPath, ['--enable-source-maps', file], { cwd: folder, env, timeout: 60_000 })
    return undefined
  } catch (error) {
    const { code, signal, stdout, stderr } = error as { code?: unknown, signal?: unknown, stdout: string, stderr: string }
    return `${block.page}:${block.line}: ended with ${String(signal ?? code)}\n${stdout}${stderr}`
  }
}
