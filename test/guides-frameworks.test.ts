/** What docs/frameworks.md promises: its code is that of test/guides/frameworks, which runs here with the real packages, over real sockets. */
import { spawn, type ChildProcess } from 'node:child_process'
import diagnostics from 'node:diagnostics_channel'
import { EventEmitter, on, once } from 'node:events'
import type { IncomingMessage, ServerResponse } from 'node:http'
import { fileURLToPath } from 'node:url'
import { createTRPCClient, createWSClient, httpBatchLink, httpBatchStreamLink, httpLink, wsLink } from '@trpc/client'
import type { FastifyInstance } from 'fastify'
import t, { type Test } from 'tap'
import { WebSocket } from 'ws'
import { addTask } from '../lib/ambient.js'
import type { ExchangeOutcome, TaskAddedMessage } from '../lib/index.js'
import * as express from './guides/frameworks/express.js'
import * as graphql from './guides/frameworks/graphql.js'
import { journal, takeJournal, writeLog } from './guides/frameworks/journal.js'
import * as trpc from './guides/frameworks/trpc.js'
import { paragraphsOf } from './support/docs/paragraphs.js'
import type { Message, Order, Registration } from './support/nest-service.js'
import { until } from './support/services.js'

t.setTimeout(120_000)
t.beforeEach(() => { takeJournal() })

t.test('each paragraph of code in docs/frameworks.md stands in a module, which is run below', async t => {
  const modules = ['when', 'nest', 'trpc', 'graphql', 'express'].map(name => `guides/frameworks/${name}.ts`)
  const { all, missing } = paragraphsOf('frameworks.md', [...modules, 'support/nest-service.ts'])
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
  t.equal(await post('/failing'), 500)
  t.strictSame(await written(), ['failed: in a middleware\n'], 'a filter finds the list where only middleware has run')
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

t.test('tRPC', async t => {
  const app = await trpc.shop()
  const url = `${await serve(t, app)}/trpc`
  const statuses: number[] = []
  const send = async (input: string | URL | Request, init?: object): Promise<Response> => {
    const reply = await fetch(input, init)
    statuses.push(reply.status)
    return reply
  }
  const fetching = { url, fetch: send }
  t.beforeEach(() => { statuses.length = 0 })

  await t.test('a procedure adds to the list of its request, and a failed one has none', async t => {
    const client = createTRPCClient<trpc.Router>({ links: [httpLink(fetching)] })
    for (const mutation of [client.order, client.orderAmbient, client.orderStrict]) {
      t.equal(await mutation.mutate('ada'), '17')
      t.strictSame(await written(app), ['ordered by ada\n'])
    }
    await t.rejects(client.order.mutate(''), { message: 'nobody orders' })
    await t.rejects(client.order.mutate(17 as never))
    t.strictSame(statuses, [200, 200, 200, 409, 400])
    t.strictSame(await written(app), [])
  })

  await t.test('the procedures of a batch share one list, and one of them that fails does not skip the tasks of the others', async t => {
    for (const [link, status] of [[httpBatchLink, 207], [httpBatchStreamLink, 200]] as const) {
      statuses.length = 0
      const client = createTRPCClient<trpc.Router>({ links: [link(fetching)] })
      const results = await Promise.allSettled([client.orderAmbient.mutate('ada'), client.orderAmbient.mutate('bob'), client.orderStrict.mutate(''), client.orderStrict.mutate('eve')])
      t.strictSame(results.map(result => result.status), ['fulfilled', 'fulfilled', 'rejected', 'fulfilled'])
      t.strictSame(statuses, [status], 'one request')
      t.strictSame(await written(app), ['ordered by ada\n', 'ordered by bob\n', 'ordered by eve\n'])
    }
    statuses.length = 0
    const client = createTRPCClient<trpc.Router>({ links: [httpBatchLink(fetching)] })
    await Promise.allSettled([client.order.mutate(''), client.order.mutate('')])
    t.strictSame(statuses, [409], 'all have failed in one way')
  })

  /** The report goes on from one percentage to the next when it is told to. */
  const stepwise = (t: Test): () => void => {
    let goOn = (): void => {}
    trpc.report.render = async percent => {
      if (percent > 50) await new Promise<void>(resolve => { goOn = resolve })
    }
    t.teardown(() => { trpc.report.render = async () => {} })
    return () => { goOn() }
  }

  await t.test('a subscription over server-sent events: its tasks run when the stream has ended', async t => {
    const goOn = stepwise(t)
    const { body } = await fetch(`${url}/progress`)
    let text = ''
    for await (const chunk of body as unknown as AsyncIterable<Uint8Array>) {
      text += Buffer.from(chunk).toString()
      if (!text.includes('data: 50\n') || text.includes('data: 100\n')) continue
      await new Promise<void>(resolve => { app.backgroundTasks.addTask(resolve) })
      t.strictSame(takeJournal(), [], 'no task has run so far')
      goOn()
    }
    t.match(text, /data: 100\n/)
    t.strictSame(await written(app), ['at 50 %\n', 'at 100 %\n'])
  })

  await t.test('over a WebSocket: the list is that of the connection, its tasks run immediately, and the context has the raw request', async t => {
    const connection = createWSClient({ url: url.replace('http', 'ws'), WebSocket: WebSocket as unknown as typeof globalThis.WebSocket })
    t.teardown(() => connection.close())
    const client = createTRPCClient<trpc.Router>({ links: [wsLink({ client: connection })] })
    t.equal(await client.orderAmbient.mutate('ada'), '17')
    t.equal(await client.orderStrict.mutate('bob'), '17')
    await t.rejects(client.orderStrict.mutate(''))
    await t.rejects(client.order.mutate('eve'), { message: /undefined/ }, 'a raw request has no list')
    t.strictSame(await written(app), ['ordered by ada\n', 'ordered by bob\n'])
    const goOn = stepwise(t)
    const ended = new Promise<void>((resolve, reject) => { client.progress.subscribe(undefined, { onComplete: resolve, onError: reject }) })
    await until(() => journal.length === 1)
    t.strictSame(takeJournal(), ['at 50 %\n'])
    goOn()
    await ended
    t.strictSame(await written(app), ['at 100 %\n'])
  })
})

t.test('GraphQL', async t => {
  const app = await graphql.shop()
  const outcomes: ExchangeOutcome[] = []
  app.addHook('onSend', async request => {
    const { backgroundTasks } = request
    backgroundTasks.addCleanup(() => { if (backgroundTasks.outcome !== undefined) outcomes.push(backgroundTasks.outcome) })
  })
  t.beforeEach(() => { outcomes.length = 0 })
  const url = `${await serve(t, app)}/graphql`
  const ask = async (...queries: string[]): Promise<unknown> => {
    const bodies = queries.map(query => ({ query }))
    const reply = await fetch(url, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(bodies.length === 1 ? bodies[0] : bodies) })
    return { status: reply.status, body: await reply.json() }
  }

  await t.test('a resolver adds to the list of its request', async t => {
    for (const field of ['order', 'orderAmbient', 'orderStrict']) {
      t.strictSame(await ask(`mutation { ${field}(email: "ada") }`), { status: 200, body: { data: { [field]: '17' } } })
      t.strictSame(await written(app), ['ordered by ada\n'])
    }
  })

  await t.test('a field that fails is no failure of the request; its own task is not added, and a `when` can skip the others', async t => {
    t.match(await ask('mutation { order(email: "ada") orderAmbient(email: "") }'), { status: 200, body: { data: { order: '17', orderAmbient: null }, errors: [{ message: 'nobody orders' }] } })
    t.strictSame(await written(app), ['ordered by ada\n'])
    t.match(outcomes, [{ statusCode: 200, failed: false }])
    t.match(await ask('mutation { orderStrict(email: "ada") order(email: "") }'), { status: 200, body: { errors: [{}] } })
    t.strictSame(await written(app), [])
  })

  await t.test('a query that is refused before a resolver runs is a failed request, except in a batch', async t => {
    for (const query of ['{ unknown }', '{ ok', '']) t.match(await ask(query), { status: 400 })
    await written(app)
    t.match(outcomes, Array(3).fill({ statusCode: 400, failed: true }))
    outcomes.length = 0
    t.match(await ask('mutation { orderStrict(email: "ada") }', '{ unknown }', 'mutation { order(email: "bob") }'), { status: 200, body: [{ data: {} }, { errors: [{}] }, { data: {} }] })
    t.strictSame(await written(app), ['ordered by ada\n', 'ordered by bob\n'], 'a batch has one list')
    t.match(outcomes, [{ statusCode: 200, failed: false }])
    await ask('mutation { orderStrict(email: "ada") }', 'mutation { order(email: "") }', 'mutation { order(email: "bob") }')
    t.strictSame(await written(app), ['ordered by bob\n'], 'and a field of any of its queries counts')
  })

  await t.test('a subscription has the list of its connection, whoever publishes', async t => {
    const added: unknown[] = []
    const note = (message: unknown): void => { added.push((message as TaskAddedMessage).request?.headers['x-client']) }
    diagnostics.subscribe('fastify-background-tasks.added', note)
    t.teardown(() => diagnostics.unsubscribe('fastify-background-tasks.added', note))
    const subscribed = new EventEmitter()
    app.graphql.addHook('preSubscriptionExecution', async () => { setImmediate(() => subscribed.emit('one')) })
    for (const name of ['ada', 'bob']) {
      const client = new WebSocket(url.replace('http', 'ws'), 'graphql-transport-ws', { headers: { 'x-client': name } })
      t.teardown(() => { client.terminate() })
      await once(client, 'open')
      client.send(JSON.stringify({ type: 'connection_init' }))
      await once(client, 'message')
      client.send(JSON.stringify({ type: 'subscribe', id: '1', payload: { query: 'subscription { ordered }' } }))
      await once(subscribed, 'one')
    }
    t.strictSame(await written(app), ['somebody listens\n', 'somebody listens\n'])
    await ask('mutation { order(email: "eve") }')
    await until(() => journal.length === 3)
    t.strictSame((await written(app)).sort(), ['ordered by eve\n', 'told that eve has ordered\n', 'told that eve has ordered\n'])
    t.strictSame(added.sort(), ['ada', 'ada', 'bob', 'bob', undefined])
  })
})

t.test('Express middleware', async t => {
  for (const name of ['@fastify/express', '@fastify/middie'] as const) {
    await t.test(name, async t => {
      const app = await express.site(name)
      app.use('/handled', (_req: IncomingMessage, _res: ServerResponse, next: (error?: Error) => void) => {
        addTask(writeLog, 'before it failed')
        next(new Error('no'))
      })
      if (name === '@fastify/express') {
        app.use('/rejects', async () => { throw new Error('no') })
        // Express knows an error handler by its four parameters.
        app.use('/handled', ((_error: Error, _req: IncomingMessage, res: ServerResponse, _next: unknown) => {
          res.statusCode = 500
          res.end()
        }) as never)
      }
      app.post('/route', async request => { request.backgroundTasks.addTask(writeLog, 'route') })
      const url = await serve(t, app)
      const post = async (path: string, key = 'secret'): Promise<number> => (await fetch(url + path, { method: 'POST', headers: { 'x-api-key': key } })).status
      t.equal(await post('/route'), 200)
      t.strictSame(await written(app), ['visited: /route\n', 'route'], 'middleware and route add to one list')
      t.equal(await post('/orders'), 202)
      t.strictSame(await written(app), ['visited: /orders\n', 'an order has come in\n'], 'a middleware answers')
      t.equal(await post('/orders', 'wrong'), 500)
      t.strictSame(await written(app), [], 'an error that a middleware passes on fails the request')
      if (name === '@fastify/express') {
        t.equal(await post('/rejects'), 500)
        t.strictSame(await written(app), [], 'and so does a rejection')
      }
      t.equal(await post('/handled'), 500)
      t.strictSame(await written(app), name === '@fastify/express' ? ['visited: /handled\n', 'before it failed'] : [], 'not an error that a middleware has answered')
    })
  }
})
