import { execFile } from 'node:child_process'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { bullmq } from 'fastify-background-tasks/bullmq'
import { rabbitmq } from 'fastify-background-tasks/rabbitmq'
import t from 'tap'
import { buildApp } from '../examples/tasks/app.js'
import { mountDashboard } from '../examples/tasks/dashboard.js'
import { mountOperator } from '../examples/tasks/operator.js'
import { openBrowser, withoutBrowser } from './support/browser.js'
import { openRedis } from './support/redis.js'

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
  t.match(Object.keys(paths), ['/reports', '/reports/soon', '/tasks/{id}'])
})

t.test('a report that is there within 300 ms is the reply, and a longer one is a 202 with Location', async t => {
  const app = await buildApp({})
  t.teardown(() => app.close())
  const order = async (pages: number): Promise<Awaited<ReturnType<typeof app.inject>>> =>
    await app.inject({ method: 'POST', url: '/reports/soon', payload: { title: 'spring', pages } })
  const soon = await order(1)
  t.match([soon.statusCode, soon.json(), soon.headers.location], [200, { file: /^\/reports\/.*\.pdf$/, pages: 1 }, undefined])
  const late = await order(20)
  t.match([late.statusCode, late.headers.location], [202, `/tasks/${late.json<{ id: string }>().id}`])
  t.match((await app.inject(String(late.headers.location))).json(), { state: 'running' })
})

t.test('the operator\'s routes stand beside the service, behind a login, and in its documentation', async t => {
  const app = await buildApp({})
  t.teardown(() => app.close())
  await mountOperator(app, { name: 'ada', password: 'secret' })
  const operate = async (method: 'GET' | 'DELETE', url: string, password = 'secret'): Promise<{ statusCode: number, json: () => any }> =>
    await app.inject({ method, url: `/operator${url}`, headers: { authorization: `Basic ${Buffer.from(`ada:${password}`).toString('base64')}` } })
  const { id } = (await app.inject({ method: 'POST', url: '/reports', payload: { title: 'spring', pages: 100 } })).json<{ id: string }>()
  t.equal((await app.inject('/operator')).statusCode, 401)
  t.equal((await operate('GET', '', 'wrong')).statusCode, 401)
  while ((await operate('GET', `/make-report/${id}`)).json().state !== 'running') await sleep(10)
  t.match((await operate('GET', '')).json(), [{ name: 'make-report', running: 1 }])
  t.equal((await operate('DELETE', `/make-report/${id}`)).statusCode, 202)
  t.match((await operate('GET', '/make-report?state=skipped')).json(), { records: [{ id }] })
  const { paths } = (await app.inject('/docs/json')).json<{ paths: Record<string, object> }>()
  t.ok('/operator/{name}/{id}/retry' in paths)
})

t.test('an operator uses the routes in a real browser', { skip: withoutBrowser() }, async t => {
  const app = await buildApp({})
  t.teardown(() => app.close())
  await mountOperator(app, { name: 'ada', password: 'secret' })
  const address = await app.listen({ port: 0, host: '127.0.0.1' })
  const { id } = (await app.inject({ method: 'POST', url: '/reports', payload: { title: 'spring', pages: 1 } })).json<{ id: string }>()
  while ((await app.inject(`/tasks/${id}`)).json().state !== 'succeeded') await sleep(10)

  const browser = await openBrowser(t)
  const page = await browser.newPage({ httpCredentials: { username: 'ada', password: 'secret' } })
  await page.goto(`${address}/docs`)
  /** Fills the form of a route, sends it, and resolves to what the page shows of the answer. */
  const execute = async (summary: string, fields: Record<string, string>): Promise<string> => {
    const route = page.locator('.opblock', { hasText: summary })
    await route.getByText(summary).click()
    await route.getByRole('button', { name: 'Try it out' }).click()
    for (const [name, value] of Object.entries(fields)) {
      const field = route.locator(`tr[data-param-name="${name}"]`)
      if (name === 'state') await field.locator('select').selectOption(value)
      else await field.locator('input').fill(value)
    }
    await route.getByRole('button', { name: 'Execute' }).click()
    return await route.locator('.live-responses-table tbody tr').first().innerText()
  }
  t.match(await execute('Count the background tasks of each definition', {}), /200[^]*"make-report"/)
  t.match(await execute('List the background tasks of a definition', { name: 'make-report', state: 'succeeded', limit: '5' }), new RegExp(`200[^]*${id}`))
  t.match(await execute('Read a background task', { name: 'make-report', id }), /200[^]*"succeeded"/)
  t.match(await execute('Start a background task again', { name: 'make-report', id }), /409[^]*has not failed for good/)
  t.match(await execute('Cancel a background task', { name: 'make-report', id }), /409[^]*has ended/)
})

t.test('the dashboard stands beside the service, behind a login, and shows what runs on Redis', async t => {
  const redis = await openRedis(t)
  if (redis === undefined) return
  const { connection, prefix } = redis
  const app = await buildApp({ engine: bullmq({ connection, prefix }), worker: false })
  t.teardown(() => app.close())
  await mountDashboard(app, connection, { name: 'ada', password: 'secret' }, prefix)
  t.equal((await app.inject({ method: 'POST', url: '/reports', payload: { title: 'spring' } })).statusCode, 202)

  const queues = async (password: string): Promise<{ statusCode: number, json: () => unknown }> => await app.inject({
    url: '/dashboard/api/queues', headers: { authorization: `Basic ${Buffer.from(`ada:${password}`).toString('base64')}` }
  })
  t.equal((await app.inject('/dashboard')).statusCode, 401)
  t.equal((await queues('wrong')).statusCode, 401)
  const shown = await queues('secret')
  t.match([shown.statusCode, shown.json()], [200, { queues: [{ name: 'make-report', counts: { waiting: 1 } }] }])
})

t.test('what the placement cannot do is a 501, and the documentation says so', async t => {
  // Nobody is there: none of it gets that far.
  const app = await buildApp({ engine: rabbitmq({ url: 'amqp://127.0.0.1:1' }), worker: false })
  t.teardown(() => app.close())
  const told = await app.inject('/tasks/00000000-0000-4000-8000-000000000000')
  t.match([told.statusCode, told.json()], [501, { message: 'what has become of a task is not kept here' }])
  const repeated = await app.inject({ method: 'POST', url: '/reports', headers: { 'idempotency-key': 'k' }, payload: { title: 'spring' } })
  t.match([repeated.statusCode, repeated.json()], [501, { message: 'repeated orders cannot be told here' }])
  const { paths } = (await app.inject('/docs/json')).json<{ paths: Record<string, Record<string, { responses: object }>> }>()
  t.ok('501' in (paths['/tasks/{id}']?.['get']?.responses ?? {}))
})

t.test('durable without a server: what was stored survives kill -9', async t => {
  // `env`, for tap gives its loaders to every process that is started here, by NODE_OPTIONS.
  const { stdout } = await promisify(execFile)('env', ['-u', 'NODE_OPTIONS', process.execPath, '--import', 'tsx', 'examples/tasks/durable.ts'], { cwd: root })
  t.match(stdout, /kill -9 while the first one was being made/)
  t.equal(stdout.match(/: succeeded$/gm)?.length, 3)
})
