/** What the guides in docs/ promise: their code is that of test/guides, which runs here. */
import { readFileSync, rmSync } from 'node:fs'
import Fastify from 'fastify'
import t from 'tap'
import * as fromFastApi from './guides/from-fastapi.js'
import { start } from './support/app.js'
import { StubEngine } from './support/stub-engine.js'

/** The lines of a text without what stands before them: code of a guide stands within a function of its module, or is exported. */
const unindented = (text: string): string => `\n${text.split('\n').map(line => line.trim().replace(/^export /, '')).join('\n')}\n`

for (const guide of ['from-fastapi']) {
  t.test(`each paragraph of code in docs/${guide}.md stands in its module, which is run below`, async t => {
    const code = unindented(readFileSync(new URL(`guides/${guide}.ts`, import.meta.url), 'utf8'))
    const text = readFileSync(new URL(`../docs/${guide}.md`, import.meta.url), 'utf8')
    const blocks = Array.from(text.matchAll(/^```ts\n(.*?)^```$/gms), ([, block = '']) => block)
    t.ok(blocks.length > 0)
    for (const paragraph of blocks.flatMap(block => block.replace(/^import .*\n/gm, '').split('\n\n'))) {
      t.ok(code.includes(unindented(paragraph.trim())), paragraph)
    }
  })
}

t.test('from FastAPI', async t => {
  // Its code writes to log.txt, as the tutorial does.
  const home = process.cwd()
  process.chdir(t.testdir())
  t.teardown(() => { process.chdir(home) })
  const takeLog = (): string => {
    const log = readFileSync('log.txt', 'utf8')
    rmSync('log.txt')
    return log
  }
  const post = { method: 'POST', url: '/send-notification/ada@example.com' } as const

  await t.test('the tutorial\'s app', async t => {
    const app = await fromFastApi.notifications()
    t.teardown(() => app.close())
    t.strictSame((await app.inject(post)).json(), { message: 'Notification sent in the background' })
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    t.equal(takeLog(), 'notification for ada@example.com: some notification\n')
  })

  await t.test('a dependency adds to the same list, before the route', async t => {
    const { app } = await start(t)
    await fromFastApi.withDependency(app)
    t.strictSame((await app.inject({ ...post, query: { q: 'hello' } })).json(), { message: 'Message sent' })
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    t.equal(takeLog(), 'found query: hello\nmessage to ada@example.com\n')
    await app.inject(post)
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    t.equal(takeLog(), 'message to ada@example.com\n')
  })

  await t.test('tasks made by hand', async t => {
    const { app } = await start(t)
    await fromFastApi.signup(app)
    const reply = await app.inject({ method: 'POST', url: '/user/signup', payload: { email: 'ada@example.com', username: 'ada' } })
    t.strictSame(reply.json(), { status: 'Signup successful' })
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    t.equal(takeLog(), 'welcome, ada@example.com\nada has signed up\n')
  })

  await t.test('a task with a name, on an engine', async t => {
    const app = Fastify()
    t.teardown(() => app.close())
    const engine = new StubEngine()
    await fromFastApi.reports(app, engine)
    const reply = await app.inject({ method: 'POST', url: '/reports', payload: { title: 'spring' } })
    const { id } = reply.json<{ id: string }>()
    t.equal(reply.statusCode, 202)
    t.match(engine.stored, [[{ id, task: 'make-report', payload: { title: 'spring' } }]])
    t.strictSame(await engine.deliver({ task: 'make-report', id, payload: { title: 'spring' } }), { kind: 'done', result: { file: 'spring.pdf' } })
    t.equal(fromFastApi.engine.name, 'bullmq')
  })
})
