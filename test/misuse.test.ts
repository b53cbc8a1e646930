/** What is refused with words, what was checked stays as it was, and no message shows a password. */
import t from 'tap'
import { cpSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import { pathToFileURL } from 'node:url'
import { inspect } from 'node:util'
import vm from 'node:vm'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import backgroundTasks, { BackgroundTask, defineTask } from '../lib/index.js'
import { start } from './support/app.js'
import { StubEngine } from './support/stub-engine.js'

type Refusal = Error & { code: string }
type Untyped = (...args: unknown[]) => unknown
type Adder = Pick<FastifyInstance['backgroundTasks'], 'addTask' | 'with'>

/** Registers, with what types would not allow. */
async function register (options: unknown): Promise<void> {
  const app = Fastify()
  try {
    await app.register(backgroundTasks, options as object)
  } finally {
    await app.close()
  }
}

/** Both things that have an `addTask`, and what only a request's has. */
async function adders (app: FastifyInstance, use: (adder: Adder) => void): Promise<FastifyRequest['backgroundTasks']> {
  let list: FastifyRequest['backgroundTasks'] | undefined
  app.get('/adders', async request => {
    list = request.backgroundTasks
    use(list as unknown as Adder)
    return 'ok'
  })
  await app.inject('/adders')
  use(app.backgroundTasks)
  return list as FastifyRequest['backgroundTasks']
}

let ran = 0
const bound = { sync: function * () { ran++ }, async: async function * () { ran++ } }
const generators: Record<string, Untyped> = {
  'a generator function': function * () { ran++ },
  'an async generator function': async function * () { ran++ },
  'a bound generator function': bound.sync.bind(null),
  'a bound async generator function': bound.async.bind(null),
  'a generator method': { * method () { ran++ } }.method,
  'a proxy of a generator function': new Proxy(function * () { ran++ }, {}),
  'a generator function of another realm': vm.runInNewContext('(function * () {})') as Untyped,
  'an async generator function of another realm': vm.runInNewContext('(async function * () {})') as Untyped
}
for (const [name, generator] of Object.entries(generators)) {
  t.test(`${name} is refused wherever a function is taken: calling one runs nothing`, async t => {
    ran = 0
    const { app } = await start(t, { maxPending: 1 })
    const refused = { code: 'FST_BGT_INVALID_TASK', message: /a generator function: calling one runs nothing$/ }
    const list = await adders(app, adder => {
      t.throws(() => adder.addTask(generator), refused)
      t.throws(() => adder.with({ timeout: 5 }).addTask(generator), refused)
    })
    t.throws(() => { list.addCleanup(generator) }, refused)
    t.throws(() => new BackgroundTask(generator), refused)
    const noOption = { code: 'FST_BGT_INVALID_OPTION' }
    for (const option of ['onError', 'waitUntil', 'when']) await t.rejects(register({ [option]: generator }), noOption, option)
    for (const option of ['handler', 'onFailed', 'when']) t.throws(() => (defineTask as Untyped)({ name: 'd', handler () {}, [option]: generator }), noOption, option)
    t.throws(() => (defineTask as Untyped)({ name: 'd', handler () {}, retry: { when: generator } }), noOption, 'retry.when')
    t.throws(() => (list.with as Untyped).call(list, { when: generator }), noOption, 'with')
    const engine = Object.assign(new StubEngine(), { enqueue: generator })
    await t.rejects(register({ engine }), { code: 'FST_BGT_INVALID_OPTION' }, 'engine')
    app.backgroundTasks.addTask(() => {})
    await app.backgroundTasks.idle()
    t.match(app.backgroundTasks.stats, { succeeded: 1, failed: 0, pending: 0 }, 'what is refused takes no place')
    t.equal(ran, 0)
  })
}

t.test('what is refused is refused with words, though nothing of it can be read', async t => {
  const { proxy: revoked, revoke } = Proxy.revocable({}, {})
  revoke()
  const hostile = (): never => { throw new Error('hostile') }
  const unreadable: Record<string, unknown> = {
    'a revoked proxy': revoked,
    'a proxy with hostile traps': new Proxy({}, { get: hostile, has: hostile, getPrototypeOf: hostile, ownKeys: hostile })
  }
  const refused = { code: 'FST_BGT_INVALID_TASK' }
  for (const [name, value] of Object.entries(unreadable)) {
    const { app } = await start(t)
    const list = await adders(app, adder => {
      t.throws(() => (adder.addTask as Untyped).call(adder, value), refused, `addTask: ${name}`)
    })
    t.throws(() => (list.addCleanup as Untyped).call(list, value), refused, `addCleanup: ${name}`)
    await t.rejects(app.backgroundTasks.enqueue(value as never), refused, `enqueue: ${name}`)
    t.match(app.backgroundTasks.stats, { pending: 0 })
  }
})

t.test('what a second copy of the package has made is refused with an error that says so', async t => {
  const dir = mkdtempSync(join(tmpdir(), 'second-copy-'))
  t.teardown(() => { rmSync(dir, { recursive: true, force: true }) })
  cpSync('lib', join(dir, 'lib'), { recursive: true })
  symlinkSync(resolve('node_modules'), join(dir, 'node_modules'))
  writeFileSync(join(dir, 'package.json'), '{"type":"module"}')
  const copy = await import(pathToFileURL(join(dir, 'lib/index.ts')).href) as typeof import('../lib/index.js')
  t.not(copy.BackgroundTask, BackgroundTask, 'it is another one')
  const mail = defineTask({ name: 'mail', handler () {} })
  const copied = copy.defineTask({ name: 'mail', handler () {} })
  const { app } = await start(t, { tasks: [mail] })
  const another = /another copy of fastify-background-tasks: install it once/
  await adders(app, adder => {
    t.throws(() => (adder.addTask as Untyped).call(adder, new copy.BackgroundTask(() => {})), { code: 'FST_BGT_INVALID_TASK', message: another }, 'a task')
    t.throws(() => (adder.addTask as Untyped).call(adder, copied), { code: 'FST_BGT_INVALID_TASK', message: another }, 'a definition')
  })
  // Anything that is no definition is refused there.
  await t.rejects(app.backgroundTasks.enqueue(copied as never), { code: 'FST_BGT_INVALID_TASK', message: another }, 'enqueue')
  await t.rejects(app.backgroundTasks.get(copied as never, 'x'), { code: 'FST_BGT_INVALID_TASK', message: another }, 'get')
  await t.rejects(register({ tasks: [copied] }), { code: 'FST_BGT_INVALID_OPTION', message: another }, 'tasks')
  const both = Fastify()
  t.teardown(() => both.close())
  await both.register(backgroundTasks)
  await t.rejects(async () => both.register(copy.default as typeof backgroundTasks), { code: 'FST_BGT_ALREADY_REGISTERED' }, 'the plugin')
})

t.test('what was checked stays, whatever becomes of the object that was passed', async t => {
  const attempts: number[] = []
  const [backoff, keep, retry] = [{ delay: 0 }, { succeeded: 60 }, { attempts: 2 }]
  const schema = { type: 'object', properties: { a: { type: 'number' } }, required: ['a'] }
  const given = {
    name: 'given',
    payload: schema,
    keep,
    timeout: 60_000,
    retry: { ...retry, backoff, when: () => true },
    when: 'success' as const,
    handler (_: { a: number }, { attempt }: { attempt: number }) { attempts.push(attempt); throw new Error('x') }
  }
  const definition = defineTask<{ a: number }>(given)
  Object.assign(given, { name: 'changed', timeout: 1, when: 'error', handler: 'no function', onFailed: 'no function' })
  Object.assign(given.retry, { attempts: 99, when: 'no function' })
  Object.assign(backoff, { delay: 3_600_000 })
  Object.assign(keep, { succeeded: 0 })
  t.match(definition, { name: 'given', timeout: 60_000, when: 'success', retry: { attempts: 2, backoff: { delay: 0 } }, keep: { succeeded: 60 } })

  const seen: unknown[] = []
  const options: Record<string, unknown> = {
    tasks: [definition], maxPending: 20, concurrency: 1, timeout: 60_000, slowTask: 60_000, closeTimeout: 1_000, onError: (error: unknown) => { seen.push(error) }, stopOnError: false, when: 'success'
  }
  const { app } = await start(t, options)
  schema.required = ['b']
  ;(options.tasks as unknown[]).length = 0
  Object.assign(options, { maxPending: 0, concurrency: 0, timeout: 'x', slowTask: 'x', closeTimeout: 'x', onError: 'x', stopOnError: true, when: 'error', waitUntil: 'x' })
  const names: string[] = []
  const jobOptions = { delay: 0, key: 'one' }
  const list = await adders(app, adder => {
    const given: Record<string, unknown> = { name: 'one', timeout: 60_000 }
    const withGiven = adder.with(given)
    Object.assign(given, { name: 'two', timeout: 'x', when: 'x' })
    names.push(withGiven.addTask(async () => { await turn() }).name)
    given.name = Symbol('three')
    names.push(withGiven.addTask(async () => { await turn() }).name)
    adder.addTask(definition, { a: 1 }, jobOptions)
    Object.assign(jobOptions, { delay: 'x', key: 'two' })
    Object.assign(jobOptions, { delay: 0 })
  })
  await app.backgroundTasks.idle()
  t.strictSame(names, ['one', 'one', 'one', 'one'])
  t.strictSame(attempts.sort(), [1, 1, 2, 2])
  t.match(seen, [{ message: 'x' }, { message: 'x' }])
  t.match(app.backgroundTasks.stats, { succeeded: 4, failed: 2, skipped: 0, pending: 0, running: 0 })
  const when: Record<string, unknown> = { when: 'always' }
  const always = list.with(when)
  when.when = 'error'
  const task = always.addTask(() => {})
  await app.backgroundTasks.idle()
  t.equal(task.state, 'succeeded')
})

const PASSWORD = 'hunter2'
/** A connection at the wrong place. */
const connections: Record<string, unknown> = {
  'a URL': `redis://:${PASSWORD}@redis:6379`,
  'a long URL': `postgres://${'u'.repeat(40)}:${PASSWORD}@${'db'.repeat(50)}/app`,
  // RFC 3986 allows them there.
  'a URL with quotes and parentheses in it': `amqp://it's(us):${PASSWORD}@mq/`,
  'a URL in text': ` from the environment: amqp://us:${PASSWORD}@mq/`,
  'a URL object': new URL(`ws://:${PASSWORD}@r`),
  'an array of URLs': [`redis://:${PASSWORD}@redis`],
  'an object with a URL': { url: `redis://:${PASSWORD}@redis` }
}
const options: Record<string, (value: unknown) => unknown> = {
  'with as a whole': value => withOf(value),
  'defineTask as a whole': value => (defineTask as Untyped)(value),
  'idle as a whole': value => idleOf(value),
  'the definition for addTask': value => addTaskOf(value),
  'the definition for enqueue': value => enqueueOf(value),
  'the id for get': value => getOf(value),
  'options of addTask': value => addTaskOf(job, null, value),
  'options of enqueue': value => enqueueOf(job, null, value),
  'tx of enqueue': value => enqueueOf(job, null, { tx: value }),
  'one of tasks': async value => { await register({ tasks: [value] }) },
  'concurrency of worker': async value => { await register({ worker: { concurrency: value } }) },
  'concurrency of a task': async value => { await register({ tasks: [job], worker: { concurrency: { job: value } } }) },
  'idle\'s rejectOnFailure': value => idleOf({ rejectOnFailure: value })
}
const job = defineTask({ name: 'job', handler () {} })
let app: FastifyInstance
const withOf = (value: unknown): unknown => app.backgroundTasks.with(value as object)
const addTaskOf = (...args: unknown[]): unknown => (app.backgroundTasks.addTask as Untyped).apply(app.backgroundTasks, args)
const enqueueOf = (...args: unknown[]): unknown => (app.backgroundTasks.enqueue as Untyped).apply(app.backgroundTasks, args)
const idleOf = async (value: unknown): Promise<void> => { await app.backgroundTasks.idle(value as object) }
const getOf = async (value: unknown): Promise<unknown> => await app.backgroundTasks.get(job, value as string)
for (const name of ['when', 'stopOnError', 'onError', 'concurrency', 'maxPending', 'timeout', 'slowTask', 'closeTimeout', 'tasks', 'engine', 'worker', 'enqueueTimeout', 'fallback', 'waitUntil', 'unknown']) {
  options[`${name} of register`] = async value => { await register({ [name]: value }) }
}
for (const name of ['timeout', 'name', 'when']) options[`${name} of with`] = value => withOf({ [name]: value })
for (const name of ['name', 'payload', 'timeout', 'retry', 'when', 'keep', 'handler', 'onFailed', 'unknown']) {
  options[`${name} of defineTask`] = value => (defineTask as Untyped)({ name: 'd', handler () {}, [name]: value })
}
for (const name of ['attempts', 'backoff', 'when']) options[`retry.${name}`] = value => (defineTask as Untyped)({ name: 'd', handler () {}, retry: { [name]: value } })
for (const name of ['type', 'delay', 'maxDelay']) options[`backoff.${name}`] = value => (defineTask as Untyped)({ name: 'd', handler () {}, retry: { backoff: { [name]: value } } })
for (const name of ['succeeded', 'failed']) options[`keep.${name}`] = value => (defineTask as Untyped)({ name: 'd', handler () {}, keep: { [name]: value } })
for (const name of ['key', 'delay']) options[`${name} of addTask`] = value => addTaskOf(job, null, { [name]: value })

t.test('no message shows a password, wherever a connection was put by mistake', async t => {
  app = (await start(t, { tasks: [job] })).app
  await app.ready()
  let refused = 0
  for (const [what, value] of Object.entries(connections)) {
    const shown: string[] = []
    for (const [name, give] of Object.entries(options)) {
      try {
        await give(value)
      } catch (error) {
        refused++
        const { message, code } = error as Refusal
        if (!(/^FST_BGT_/.test(code)) || `${message} ${inspect(error)}`.includes(PASSWORD)) shown.push(name, message)
      }
    }
    t.strictSame(shown, [], what)
  }
  // A `name` or `key` may be any string, a payload any object.
  t.ok(refused > 0.8 * Object.keys(options).length * Object.keys(connections).length, `${refused} were refused`)
})
