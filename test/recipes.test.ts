/** What docs/recipes.md promises of other plugins, and of work in a thread. */
import t from 'tap'
import { access, readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import multipart from '@fastify/multipart'
import { defineTask } from '../lib/index.js'
import { reports } from './guides/reports.js'
import { start } from './support/app.js'

t.test('uploads of @fastify/multipart taken over by the request outlive its onResponse hook, and a cleanup deletes them', async t => {
  const { app, address } = await start(t)
  await app.register(multipart)
  const read: string[] = []
  const paths: string[] = []
  app.post('/', async (request, reply) => {
    const { files } = await request.saveRequestFiles()
    paths.push(...files.map(file => file.filepath))
    request.tmpUploads = null
    request.backgroundTasks.addTask(async (paths: string[]) => {
      for (const path of paths) read.push(await readFile(path, 'utf8'))
    }, [...paths])
    request.backgroundTasks.addCleanup(async () => {
      await Promise.all(files.map(async file => { await rm(file.filepath, { force: true }) }))
    })
    return await reply.code(202).send()
  })
  const body = new FormData()
  body.append('file', new Blob(['hello']), 'hello.txt')
  t.equal((await fetch(await address(), { method: 'POST', body })).status, 202)
  await app.backgroundTasks.idle({ rejectOnFailure: true })
  t.strictSame(read, ['hello'])
  await t.rejects(access(paths[0] as string), { code: 'ENOENT' })
})

t.test('a report is rendered in a thread while the event loop is free, and is served', async t => {
  const folder = t.testdir({ 'sales.csv': 'day,<sales>\nMonday,17\n' })
  const app = await reports(join(folder, 'sales.csv'), folder)
  t.teardown(() => app.close())
  const address = await app.listen({ port: 0, host: '127.0.0.1' })
  const order = async (): Promise<string> => (await fetch(`${address}/reports`, { method: 'POST' })).headers.get('location') ?? ''
  const small = await order()
  await app.backgroundTasks.idle({ rejectOnFailure: true })
  const report = await fetch(address + small)
  t.match([report.status, report.headers.get('content-type'), report.headers.get('content-encoding')], [200, /text.html/, 'gzip'])
  t.equal(await report.text(), '<!doctype html><table><tr><td>day</td><td>&lt;sales></td></tr><tr><td>Monday</td><td>17</td></tr>')
  t.strictSame(await readdir(folder), [`${small.slice('/reports/'.length)}.html.gz`, 'sales.csv'].sort())
  t.equal((await fetch(`${address}/reports/00000000-0000-4000-8000-000000000000`)).status, 404)

  await writeFile(join(folder, 'sales.csv'), 'Monday,17\n'.repeat(50_000))
  const large = await order()
  const answers: unknown[] = []
  let body = await (await fetch(address + large)).text()
  while (body.startsWith('{')) {
    answers.push(JSON.parse(body))
    await sleep(1)
    body = await (await fetch(address + large)).text()
  }
  t.ok(answers.length > 3, 'requests are answered meanwhile')
  t.match(answers.at(-1), { state: 'running' })
  t.ok(body.length > 1_000_000)
})

t.test('a reply waits a moment for its task, and is a 202 with Location if the task takes longer', async t => {
  let release = (): void => {}
  const sendEmail = defineTask({
    name: 'send-email',
    retry: { attempts: 1 },
    async handler ({ subject }: { to: string, subject: string }) {
      if (subject === 'slow') await new Promise<void>(resolve => { release = resolve })
      if (subject === 'fails') throw new Error('no')
      return { sent: subject }
    }
  })
  const { app, address } = await start(t, { tasks: [sendEmail] })
  app.post<{ Body: { to: string, subject: string } }>('/mails', async (request, reply) => {
    const { id } = await app.backgroundTasks.enqueue(sendEmail, request.body)
    const record = await app.backgroundTasks.result(sendEmail, id, { timeout: 300 })
    if (record?.state === 'succeeded') return record.result
    return await reply.code(202).header('location', `/tasks/${id}`).send({ id })
  })
  const post = async (subject: string): Promise<{ status: number, location: string | null, body: any }> => {
    const reply = await fetch(`${await address()}/mails`, { method: 'POST', body: JSON.stringify({ to: 'ada@example.com', subject }), headers: { 'content-type': 'application/json' } })
    return { status: reply.status, location: reply.headers.get('location'), body: await reply.json() }
  }
  t.strictSame(await post('soon'), { status: 200, location: null, body: { sent: 'soon' } })
  for (const [subject, state] of [['slow', 'running'], ['fails', 'failed']] as const) {
    const { status, location, body } = await post(subject)
    t.strictSame([status, location], [202, `/tasks/${body.id}`])
    t.match(await app.backgroundTasks.get(sendEmail, body.id), { state })
  }
  release()
})
