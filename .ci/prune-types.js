/** Deletes the type declarations that no entry point of the package reaches: half of the files describe what no user can import. */
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { dirname, join } from 'node:path'

const entries = ['plugin', 'index', 'testing', 'ambient', 'task-routes', ...['bullmq', 'pg-boss', 'rabbitmq'].map(engine => `engines/${engine}/index`)]
const reached = new Set()

function reach (file) {
  if (reached.has(file) || !existsSync(file)) return
  reached.add(file)
  for (const [, path] of readFileSync(file, 'utf8').matchAll(/(?:from|import\() *["'](\.[^"']+)\.js["']/g)) reach(join(dirname(file), `${path}.d.ts`))
}

for (const entry of entries) reach(join('dist', `${entry}.d.ts`))
for (const name of readdirSync('dist', { recursive: true })) {
  const file = join('dist', name)
  if (file.endsWith('.d.ts') && !reached.has(file)) rmSync(file)
}
