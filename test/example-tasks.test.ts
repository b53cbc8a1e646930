import { execFile } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import t from 'tap'
import { buildApp } from '../examples/tasks/app.js'

t.setTimeout(120_000)
const root = fileURLToPath(new URL('..', import.meta.url))

t.test('POST answers 202 with Location, where the task can be followed; both are in the documentation', async t => {
  const app = await buildApp({})
  t.teardown(() => app.close())
  const order = async (): Promise<Awaited<ReturnType<typeof app.inject>>> =>
    await app.inject({ method: 'POST', url: '/reports', headers: { 'idempotency-key': 'k' }, payload: { title: 'spring', pages: 1 } })
  const reply = await order()
  const location = String(reply.headers.location)
  t.equal(reply.statusCode, 202)
  t.equal(location, `/tasks/${reply.json<{ id: string }>().id}`)
  t.equal((await order()).headers.location, location, 'the repeated order is the same task')
  const record = async (): Promise<{ state: string }> => (await app.inject(location)).json()
  while ((await record()).state !== 'succeeded') await sleep(20)
  t.match(await record(), { name: 'make-report', attempt: 1, result: { pages: 1 } })
  t.equal((await app.inject('/tasks/00000000-0000-4000-8000-000000000000')).statusCode, 404)
  const { paths } = (await app.inject('/docs/json')).json<{ paths: Record<string, object> }>()
  t.match(Object.keys(paths), ['/reports', '/tasks/{id}'])
})

t.test('durable without a server: what was stored survives kill -9', async t => {
  // `env`, for tap gives its loaders to every process that is started here, by NODE_OPTIONS.
  const { stdout } = await promisify(execFile)('env', ['-u', 'NODE_OPTIONS', process.execPath, '--import', 'tsx', 'examples/tasks/durable.ts'], { cwd: root })
  t.match(stdout, /kill -9 while the first one was being made/)
  t.equal(stdout.match(/: succeeded$/gm)?.length, 3)
})
