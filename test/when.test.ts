/** Which tasks of an exchange run: `when`, asked once the exchange has ended. */
import t from 'tap'
import { Readable } from 'node:stream'
import { setImmediate as turn } from 'node:timers/promises'
import { Type } from '@sinclair/typebox'
import type { FastifyInstance } from 'fastify'
import type { ExchangeOutcome, TaskCondition } from '../lib/index.js'
import { deferred, start } from './support/app.js'
import { beforeFastify } from './support/fastify-version.js'

/** Adds one task for each condition in an early hook, and says which of them ran. */
function addOneForEach (app: FastifyInstance): string[] {
  const ran: string[] = []
  app.addHook('onRequest', async request => {
    const tasks = request.backgroundTasks
    tasks.addTask(() => { ran.push('default') })
    for (const when of ['success', 'error', 'always'] as const) tasks.with({ when }).addTask(() => { ran.push(when) })
  })
  return ran
}

const SUCCESS = ['default', 'success', 'always']
const ERROR = ['error', 'always']
const broken = (): never => { throw Object.assign(new Error('broken'), { statusCode: 418 }) }

t.test('an exchange in which an error was thrown or sent has failed; a status set by hand is no failure', async t => {
  const cases: Record<string, { expected: string[], status: number, routes: (app: FastifyInstance) => void, method?: 'POST' }> = {
    'a reply': { expected: SUCCESS, status: 200, routes: app => app.get('/', async () => 'ok') },
    '404 by hand': { expected: SUCCESS, status: 404, routes: app => app.get('/', async (_, reply) => reply.code(404).send('no')) },
    '500 by hand': { expected: SUCCESS, status: 500, routes: app => app.get('/', (_, reply) => { reply.code(500).send({ no: true }) }) },
    'not found': { expected: SUCCESS, status: 404, routes: () => {} },
    'callNotFound with a handler': {
      expected: SUCCESS,
      status: 200,
      routes: app => {
        app.setNotFoundHandler(async () => 'found after all')
        app.get('/', (_, reply) => { reply.callNotFound() })
      }
    },
    'a not-found handler that throws': { expected: ERROR, status: 418, routes: app => app.setNotFoundHandler(broken) },
    'an error thrown by a synchronous handler': { expected: ERROR, status: 418, routes: app => app.get('/', broken) },
    'an error thrown by an async handler': { expected: ERROR, status: 418, routes: app => app.get('/', async () => broken()) },
    'an error sent': { expected: ERROR, status: 500, routes: app => app.get('/', (_, reply) => { reply.send(new Error('x')) }) },
    'an error returned': { expected: ERROR, status: 500, routes: app => app.get('/', async () => new Error('x')) },
    'a string thrown': { expected: ERROR, status: 500, routes: app => app.get('/', async () => { throw 'x' }) }, // eslint-disable-line no-throw-literal
    'undefined thrown': { expected: ERROR, status: 500, routes: app => app.get('/', async () => { throw undefined }) }, // eslint-disable-line no-throw-literal
    'a body that does not validate': {
      expected: ERROR,
      status: 400,
      method: 'POST',
      routes: app => app.post('/', { schema: { body: Type.Object({ to: Type.String() }) } }, async () => 'ok')
    },
    'a reply that does not serialize': {
      expected: ERROR,
      status: 500,
      routes: app => app.get('/', { schema: { response: { 200: Type.Object({ to: Type.String() }) } } }, async () => ({}))
    },
    'a stream that fails before the headers': {
      expected: ERROR,
      status: 500,
      routes: app => app.get('/', async () => new Readable({ read () { this.destroy(new Error('x')) } }))
    },
    'an error handler that answers 200': {
      expected: ERROR,
      status: 200,
      routes: app => {
        app.setErrorHandler(async () => 'nothing happened')
        app.get('/', broken)
      }
    },
    'an error handler that throws': {
      expected: ERROR,
      status: 418,
      routes: app => {
        app.setErrorHandler(async () => broken())
        app.get('/', async () => { throw new Error('first') })
      }
    }
  }
  for (const hook of ['onRequest', 'preParsing', 'preValidation', 'preHandler', 'preSerialization', 'onSend'] as const) {
    cases[`an error in ${hook}`] = {
      expected: ERROR,
      status: 418,
      routes: app => {
        // The hook's own parameters differ; this one uses none.
        app.addHook(hook as 'onRequest', async () => { broken() })
        app.get('/', async () => ({}))
      }
    }
  }
  cases['an error in onResponse'] = {
    expected: SUCCESS,
    status: 200,
    routes: app => {
      app.addHook('onResponse', async () => { broken() })
      app.get('/', async () => 'ok')
    }
  }
  for (const [name, { expected, status, routes, method = 'GET' }] of Object.entries(cases)) {
    const { app, address } = await start(t)
    const ran = addOneForEach(app)
    routes(app)
    const init = method === 'POST' ? { method, body: '{}', headers: { 'content-type': 'application/json' } } : { method }
    const response = await fetch(await address(), init)
    await response.text()
    await app.backgroundTasks.idle()
    t.equal(response.status, status, `${name}: status`)
    t.strictSame(ran, expected, name)
  }
})

t.test('the error handler\'s own tasks run by the same outcome, in their turn', async t => {
  const { app, get } = await start(t)
  const ran = addOneForEach(app)
  app.setErrorHandler(async (_error, request, reply) => {
    await turn()
    request.backgroundTasks.with({ when: 'error' }).addTask(() => { ran.push('error handler') })
    return reply.code(500).send('sorry')
  })
  app.get('/', async () => broken())
  t.equal(await get('/'), 'sorry')
  await app.backgroundTasks.idle()
  t.strictSame(ran, [...ERROR, 'error handler'])
})

t.test('the option of the app is the default, the task\'s own is nearer', async t => {
  const { app } = await start(t, { when: 'always' })
  const ran = addOneForEach(app)
  app.get('/', broken)
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['default', ...ERROR])
})

t.test('a function decides by the outcome; one that throws fails its task', async t => {
  const outcomes: ExchangeOutcome[] = []
  const errors: unknown[] = []
  const { app, logs } = await start(t, { onError: error => { errors.push(error) } })
  const ran: string[] = []
  const when: TaskCondition = outcome => {
    outcomes.push(outcome)
    return outcome.statusCode >= 400
  }
  app.get('/:status', async (request, reply) => {
    const tasks = request.backgroundTasks
    tasks.with({ when }).addTask(() => { ran.push(request.url) })
    tasks.with({ when: () => { throw new Error('when') } }).addTask(() => { ran.push('never') })
    tasks.addTask(() => { ran.push('next') })
    return reply.code(Number((request.params as { status: string }).status)).send('x')
  })
  await app.inject('/200')
  await app.backgroundTasks.idle()
  await app.inject('/404')
  await app.backgroundTasks.idle()
  t.strictSame(ran, ['next', '/404', 'next'])
  t.strictSame(outcomes, [{ statusCode: 200, failed: false, aborted: false }, { statusCode: 404, failed: false, aborted: false }])
  t.match(errors, [{ message: 'when' }, { message: 'when' }])
  t.match(app.backgroundTasks.stats, { failed: 2, skipped: 1, succeeded: 3, pending: 0, running: 0 })
  t.match(logs.filter(line => line.msg.startsWith('background task skipped')), [{ level: 20, reason: 'its `when` returned false', reqId: String }])
})

t.test('what is skipped is named with the reason, at level debug', async t => {
  const { app, logs } = await start(t)
  app.get('/fails', async request => {
    request.backgroundTasks.addTask(function success () {})
    throw new Error('x')
  })
  app.get('/', async request => {
    request.backgroundTasks.with({ when: 'error', name: 'given' }).addTask(function error () {})
    request.backgroundTasks.addTask(function cancelled () {}).cancel()
    return 'ok'
  })
  await app.inject('/fails')
  await app.backgroundTasks.idle()
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.match(logs.filter(line => line.msg.startsWith('background task skipped')), [
    { level: 20, task: { name: 'success' }, reason: 'the exchange failed, and its `when` is \'success\'' },
    { level: 20, task: { name: 'cancelled' }, reason: 'it was cancelled' },
    { level: 20, task: { name: 'given' }, reason: 'the exchange did not fail, and its `when` is \'error\'' }
  ])
})

t.test('a handler timeout is a failed exchange, whatever the handler does later', { skip: beforeFastify('5.8.0', 'it has no handlerTimeout') }, async t => {
  const { app, get } = await start(t)
  const ran = addOneForEach(app)
  const gate = deferred()
  const done = deferred()
  app.get('/', { handlerTimeout: 20 }, async request => {
    await gate.promise
    request.backgroundTasks.addTask(() => { ran.push('late') })
    request.backgroundTasks.with({ when: 'always' }).addTask(() => { ran.push('late, always'); done.resolve() })
    return 'too late'
  })
  t.match(JSON.parse(await get('/')), { statusCode: 503 })
  await app.backgroundTasks.idle()
  t.strictSame(ran, ERROR)
  gate.resolve()
  await done.promise
  t.strictSame(ran, [...ERROR, 'late, always'])
})

t.test('tasks of the app have no exchange: they always run', async t => {
  const { app } = await start(t, { when: 'error' })
  let ran = false
  app.backgroundTasks.addTask(() => { ran = true })
  await app.backgroundTasks.idle()
  t.ok(ran)
})
