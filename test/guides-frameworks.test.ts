/** What docs/frameworks.md promises: its code is that of test/guides/frameworks, which runs here with the real packages, over real sockets. */
import { spawn, type ChildProcess } from 'node:child_process'
import { on, once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { createTRPCClient, createWSClient, httpBatchLink, httpBatchStreamLink, httpLink, wsLink } from '@trpc/client'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { WebSocket } from 'ws'
import * as express from './guides/frameworks/express.js'
import * as graphql from './guides/frameworks/graphql.js'
import { takeJournal } from './guides/frameworks/journal.js'
import * as trpc from './guides/frameworks/trpc.js'
import { paragraphsOf } from './support/docs/paragraphs.js'
import type { Message, Order, Registration } from './support/nest-service.js'
import { until } from './support/services.js'

t.setTimeout(120_000)
t.beforeEach(() => { takeJournal() })

t.test('each paragraph of code in docs/frameworks.md stands in a module, which is run below', async t => {
  const { all, missing } = paragraphsOf('frameworks.md', ['nest', 'trpc', 'graphql', 'express'].map(name => `guides/frameworks/${name}.ts`))
  t.ok(all.length > 20)
  t.strictSame(missing, [])
})

/** The address of an app, which listens from now on, and is closed at the end of the test. */
async function serve (t: Test, app: FastifyInstance): Promise<string> {
  t.teardown(() => app.close())
  return await app.listen({ port: 0, host: '127.0.0.1' })
}

/** Resolves to what was written, when all tasks have run. */
async function written (app: FastifyInstance): Promise<string[]> {
  await app.backgroundTasks.idle({ rejectOnFailure: true })
  return takeJournal()
}

/** The NestJS app of the page, in a process of its own. */
interface NestService {
  readonly process: ChildProcess
  /** What its tasks and hooks have written, in order. */
  readonly wrote: string[]
  post: (path: string, email?: string, key?: string) => Promise<number>
  order: (order: Order) => void
  /** What it has written until all tasks have run. */
  written: () => Promise<string[]>
}

async function startNest (t: Test, registration: Registration): Promise<NestService> {
  const file = fileURLToPath(new URL('support/nest-service.ts', import.meta.url))
  // `env`, because tap gives its loaders to every process that is started here, by NODE_OPTIONS.
  const child = spawn('env', ['-u', 'NODE_OPTIONS', process.execPath, '--import', 'tsx', file], {
    stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
    env: { ...process.env, PORT: '0', REGISTRATION: registration }
  })
  t.teardown(() => { child.kill('SIGKILL') })
  const wrote: string[] = []
  child.on('message', (message: Message) => { if ('wrote' in message) wrote.push(message.wrote) })
  const next = async <Key extends 'address' | 'written'>(key: Key): Promise<Extract<Message, Record<Key, unknown>>> => {
    for await (const [message] of on(child, 'message', { close: ['exit'] }) as AsyncIterable<[Message]>) {
      if (key in message) return message as Extract<Message, Record<Key, unknown>>
    }
    throw new Error('the service has ended')
  }
  const { address } = await next('address')
  return {
    process: child,
    wrote,
    async post (path, email = 'ada', key = 'secret') {
      const headers = { 'x-api-key': key, 'content-type': 'application/json' }
      const reply = await fetch(address + path, { method: 'POST', headers, body: JSON.stringify({ email }) })
      await reply.text()
      return reply.status
    },
    order (order) { child.send(order) },
    async written () {
      const answer = next('written')
      child.send('idle' satisfies Order)
      return (await answer).written
    }
  }
}

t.test('NestJS: middleware, guard, controller, provider and interceptor add to one list, and a handler reaches a provider', async t => {
  const { post, written } = await startNest(t, 'page')
  for (const path of ['/orders', '/orders/ambient']) {
    t.equal(await post(path), 201)
    t.strictSame(await written(), [`visited: ${path}\n`, 'ordered by ada\n', 'a receipt for ada', `done: ${path}\n`])
  }
  t.equal(await post('/orders', 'ada', 'wrong'), 403)
  t.strictSame(await written(), ['refused: /orders\n', 'failed: Forbidden resource\n'], 'a guard refuses')
  t.equal(await post('/orders/ambient', ''), 500)
  t.strictSame(await written(), ['failed: nobody orders\n'], 'a controller throws')
})

t.test('NestJS: the reply of an exception filter is no failure of the request, so the default `when` runs its tasks', async t => {
  const { post, written } = await startNest(t, 'before create')
  t.equal(await post('/orders/ambient', ''), 500)
  t.strictSame(await written(), ['visited: /orders/ambient\n', 'ordered by \n', 'failed: nobody orders\n'])
})

t.test('NestJS: a plugin that is registered after NestFactory.create is not there for ambient tasks of middleware', async t => {
  const { post, written } = await startNest(t, 'after create')
  t.equal(await post('/orders'), 500)
  t.strictSame(await written(), [])
})

t.test('NestJS: the shutdown', async t => {
  const HOOKS_BEFORE = ['onModuleDestroy', 'beforeApplicationShutdown']
  const TASKS = ['a task ends', 'a receipt for ada']
  /** Begins a shutdown while a task runs, and lets the task end when those lines were written. */
  const shutDown = async (t: Test, begin: (service: NestService) => void, before: string[]): Promise<{ wrote: string[], code: unknown, signal: unknown }> => {
    const service = await startNest(t, 'page')
    service.order('add')
    await until(() => service.wrote.length === 1)
    const exit = once(service.process, 'exit')
    begin(service)
    await until(() => service.wrote.length === 1 + before.length)
    service.order('go on')
    const [code, signal] = await exit as unknown[]
    return { wrote: service.wrote, code, signal }
  }
  const expected = ['a task begins', ...HOOKS_BEFORE, ...TASKS, 'onApplicationShutdown']
  await t.test('app.close() waits for tasks after onModuleDestroy, and before onApplicationShutdown', async t => {
    t.strictSame(await shutDown(t, ({ order }) => { order('close') }, HOOKS_BEFORE), { wrote: expected, code: 0, signal: null })
  })
  await t.test('so does SIGTERM with enableShutdownHooks(), and then the process ends by the signal', async t => {
    t.strictSame(await shutDown(t, ({ process }) => { process.kill('SIGTERM') }, HOOKS_BEFORE), { wrote: expected, code: null, signal: 'SIGTERM' })
  })
  await t.test('closing the adapter first waits for tasks before onModuleDestroy', async t => {
    const wrote = ['a task begins', ...TASKS, ...HOOKS_BEFORE, 'onApplicationShutdown']
    t.strictSame(await shutDown(t, ({ order }) => { order('close the adapter first') }, []), { wrote, code: 0, signal: null })
  })
})
