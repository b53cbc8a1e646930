/** What docs/recipes.md promises of other plugins. */
import t from 'tap'
import { access, readFile, rm } from 'node:fs/promises'
import multipart from '@fastify/multipart'
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
