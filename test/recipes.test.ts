/** What docs/recipes.md promises of other plugins. */
import t from 'tap'
import { access, readFile, rm } from 'node:fs/promises'
import multipart from '@fastify/multipart'
import { defineTask } from '../lib/index.js'
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
