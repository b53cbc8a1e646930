// What the plugin refuses, and how it says so.
import { inspect } from 'node:util'
import t, { type Test } from 'tap'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import backgroundTasks, { BackgroundTask, declareTask, defineTask, type FastifyBackgroundTasksOptions } from '../lib/index.js'

/** Callers in JavaScript pass what they like. */
type Untyped = (...args: unknown[]) => unknown

interface Refusal extends Error {
  code: string
  statusCode: number
}

t.test('a wrong value of an option is refused at register: its name, the value and what is accepted', async t => {
  const when = '\'success\', \'error\', \'always\' or a function of the outcome'
  const limit = 'an integer of at least 1, or Infinity'
  const duration = 'a finite number of milliseconds above 0'
  const rules: Array<[option: string, accepts: string, wrong: unknown[]]> = [
    ['when', when, ['never', '', true, 1, {}, null]],
    ['stopOnError', 'a boolean', ['yes', 0, 1, {}, null]],
    ['onError', 'a function', ['log', true, {}, null]],
    ['concurrency', limit, [0, -1, 1.5, NaN, -Infinity, '10', 10n, true, null]],
    ['maxPending', limit, [0, -1, 1.5, NaN, -Infinity, '10', 10n, true, null]],
    ['timeout', duration, [0, -1, NaN, Infinity, '5s', '5000', 5n, new Date(0), null]],
    ['slowTask', duration, [0, -1, NaN, Infinity, '5s', '5000', 5n, new Date(0), null]],
    ['closeTimeout', 'a finite number of milliseconds of at least 0', [-1, NaN, Infinity, '8s', 5n, false, null]],
    ['waitUntil', 'a function', ['now', true, {}, null]]
  ]
  for (const [option, accepts, values] of rules) {
    for (const value of values) {
      const error = await refusalOf(register(t, { [option]: value }))
      t.match(error, { code: 'FST_BGT_INVALID_OPTION', statusCode: 500, name: 'FastifyError' })
      t.type(error, TypeError)
      t.equal(error.message, `fastify-background-tasks: The option "${option}" of register accepts ${accepts}; received ${inspect(value)}`)
    }
  }
})

t.test('a wrong value is shown in one short line', async t => {
  async function sendMail (): Promise<void> {}
  const shown: Array<[option: string, value: unknown, received: string]> = [
    ['timeout', sendMail, 'the function sendMail'],
    ['timeout', () => {}, 'the function (anonymous)'],
    ['when', { status: { code: 200 } }, '{ status: [Object] }'],
    ['when', 'x'.repeat(10_000), `'${'x'.repeat(60)}'... 9940 more characters`],
    ['when', 'two\nlines', '\'two\\nlines\''],
    ['when', Symbol('when'), 'Symbol(when)']
  ]
  for (const [option, value, received] of shown) {
    const { message } = await refusalOf(register(t, { [option]: value }))
    t.equal(message.slice(message.indexOf('; received ')), `; received ${received}`)
  }
  const { message } = await refusalOf(register(t, { when: Object.fromEntries(Array.from({ length: 99 }, (_, i) => [`key${i}`, i])) }))
  t.ok(message.length < 250 && !message.includes('\n'), message)
})

t.test('an unknown option is refused by name', async t => {
  const known = 'when, stopOnError, onError, concurrency, maxPending, timeout, slowTask, closeTimeout, ' +
    'tasks, engine, worker, enqueueTimeout, fallback, waitUntil'
  for (const name of ['timeOut', 'max_pending', 'toString', 'constructor', '0']) {
    const error = await refusalOf(register(t, { [name]: 1 }))
    t.match(error, { code: 'FST_BGT_INVALID_OPTION', message: `fastify-background-tasks: register has no option "${name}"; it accepts ${known}` })
  }
})

t.test('the smallest and largest values, and undefined, are accepted', async t => {
  const accepted: FastifyBackgroundTasksOptions[] = [
    {},
    { when: 'success' }, { when: 'error' }, { when: 'always' }, { when: () => true },
    { stopOnError: true }, { stopOnError: false },
    { onError: () => {} }, { onError: async () => {} },
    { concurrency: 1 }, { concurrency: Infinity }, { concurrency: Number.MAX_SAFE_INTEGER },
    { maxPending: 1 }, { maxPending: Infinity },
    { timeout: Number.MIN_VALUE }, { timeout: 0.5 }, { timeout: 2 ** 40 },
    { slowTask: 0.5 }, { slowTask: 2 ** 40 },
    { closeTimeout: 0 }, { closeTimeout: 2 ** 40 },
    { waitUntil: () => {} },
    {
      when: undefined,
      stopOnError: undefined,
      onError: undefined,
      concurrency: undefined,
      maxPending: undefined,
      timeout: undefined,
      slowTask: undefined,
      closeTimeout: undefined,
      waitUntil: undefined
    }
  ]
  for (const options of accepted) t.ok((await register(t, options)).hasDecorator('backgroundTasks'), inspect(options))
})

t.test('the options of register itself are accepted', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(backgroundTasks, { prefix: '/tasks', logLevel: 'warn', logSerializers: { task: String } })
  t.equal(await runOne(app.backgroundTasks), 'succeeded')
})

t.test('options may be an instance of a class: what it inherits is checked, and its functions are called on it', async t => {
  class Options {
    readonly #called: string[]
    readonly #maxPending: unknown
    constructor (called: string[], maxPending: unknown) {
      this.#called = called
      this.#maxPending = maxPending
    }

    get maxPending (): unknown { return this.#maxPending }
    when (): boolean { return this.#called.push('when') > 0 }
    onError (): void { this.#called.push('onError') }
    waitUntil (): void { this.#called.push('waitUntil') }
  }
  const called: string[] = []
  const app = await register(t, new Options(called, 1))
  app.get('/', async request => { request.backgroundTasks.addTask(() => { throw new Error('no') }) })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.strictSame(called, ['waitUntil', 'when', 'onError'])
  t.match((await refusalOf(register(t, new Options(called, 'many')))).message, /^fastify-background-tasks: The option "maxPending" of register accepts .*; received 'many'$/)
  t.ok(await register(t, { tasks: [defineTask({ name: 'constructor', handler () {} })], worker: { concurrency: {} } }), 'what every object inherits is no option')
})

t.test('the functions of a definition are called on the objects that they are methods of', async t => {
  const called: string[] = []
  class Retry { #called = called; attempts = 2; backoff = { delay: 0 }; when (): boolean { return this.#called.push('retry.when') > 0 } }
  class Failures { #called = called; onFailed (): void { this.#called.push('onFailed') } }
  class Declared { #called = called; name = 'declared'; retry = new Retry(); when (): boolean { return this.#called.push('when') > 0 } }
  class Defined extends Failures { #own = called; name = 'defined'; retry = { attempts: 1 }; when (): boolean { return this.#own.push('when') > 0 } handler (): void { this.#own.push('handler'); throw new Error('no') } }
  class Generates { name = 'generates'; * handler (): Generator { yield called } }
  const declared = declareTask(new Declared()).handledBy(() => { throw new Error('no') }, new Failures())
  const defined = defineTask(new Defined())
  t.throws(() => defineTask(new Generates()), { code: 'FST_BGT_INVALID_OPTION', message: /^The option "handler" of defineTask accepts a function/ })
  const app = await register(t, { tasks: [declared, defined] })
  for (const task of [declared, defined]) app.get(`/${task.name}`, async request => { request.backgroundTasks.addTask(task) })
  await app.inject('/declared')
  await app.backgroundTasks.idle()
  t.strictSame(called.splice(0), ['when', 'retry.when', 'when', 'onFailed'])
  await app.inject('/defined')
  await app.backgroundTasks.idle()
  t.strictSame(called, ['when', 'handler', 'onFailed'])
})

t.test('options may come from a function, and are checked then too', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(backgroundTasks, () => ({ maxPending: 1 }))
  app.backgroundTasks.addTask(() => {})
  t.throws(() => app.backgroundTasks.addTask(() => {}), { code: 'FST_BGT_OVERLOADED' })

  const other = Fastify()
  t.teardown(() => other.close())
  await t.rejects(async () => other.register(backgroundTasks, () => ({ maxPending: 0 })), { code: 'FST_BGT_INVALID_OPTION' })
})

t.test('registering twice is refused', async t => {
  const refused = { code: 'FST_BGT_ALREADY_REGISTERED', message: /already for this app or a parent of it\. Register it once/ }

  t.test('in one scope', async t => {
    const app = await register(t)
    await t.rejects(async () => app.register(backgroundTasks), refused)
  })

  t.test('in a child of one that has it', async t => {
    const app = await register(t)
    await t.rejects(async () => app.register(async child => { await child.register(backgroundTasks) }), refused)
  })

  t.test('in a grandchild', async t => {
    const app = await register(t)
    await t.rejects(async () => app.register(async child => {
      child.register(async grandchild => { await grandchild.register(backgroundTasks) })
    }), refused)
  })
})

t.test('registered in an encapsulated child only, it belongs to that child', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(async child => {
    await child.register(backgroundTasks)
    child.get('/child', async request => ({ has: 'backgroundTasks' in request }))
    child.register(async grandchild => {
      grandchild.get('/grandchild', async request => ({ has: 'backgroundTasks' in request }))
      t.equal(grandchild.backgroundTasks, child.backgroundTasks)
    })
  })
  app.get('/parent', async request => ({ has: 'backgroundTasks' in request }))
  t.same((await app.inject('/child')).json(), { has: true })
  t.same((await app.inject('/grandchild')).json(), { has: true })
  t.same((await app.inject('/parent')).json(), { has: false })
  t.notOk(app.hasDecorator('backgroundTasks'))
})

t.test('siblings have their own, with their own options', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  const children: FastifyInstance[] = []
  for (const [prefix, maxPending] of [['/one', 1], ['/two', 2]] as const) {
    await app.register(async child => {
      children.push(child)
      await child.register(backgroundTasks, { maxPending })
      child.get('/', async request => {
        request.backgroundTasks.addTask(() => {})
        request.backgroundTasks.addTask(() => {})
        return 'ok'
      })
    }, { prefix })
  }
  const [one, two] = children.map(child => child.backgroundTasks)
  t.not(one, two)
  t.equal((await app.inject('/one')).statusCode, 503)
  t.equal((await app.inject('/two')).statusCode, 200)
  await Promise.all([one?.idle(), two?.idle()])
  t.match(one?.stats, { succeeded: 0, skipped: 1 })
  t.match(two?.stats, { succeeded: 2, skipped: 0 })
})

t.test('a parent may get one after its child: each keeps its own', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  let childTasks: FastifyInstance['backgroundTasks'] | undefined
  const add = async (request: FastifyRequest): Promise<string> => {
    request.backgroundTasks.addTask(() => {})
    return 'ok'
  }
  await app.register(async child => {
    await child.register(backgroundTasks)
    childTasks = child.backgroundTasks
    child.get('/child', add)
  })
  await app.register(backgroundTasks)
  app.get('/parent', add)
  t.not(app.backgroundTasks, childTasks)

  t.equal((await app.inject('/child')).statusCode, 200)
  await childTasks?.idle()
  t.match(childTasks?.stats, { succeeded: 1 })
  t.match(app.backgroundTasks.stats, { succeeded: 0 })

  t.equal((await app.inject('/parent')).statusCode, 200)
  await app.backgroundTasks.idle()
  t.match(childTasks?.stats, { succeeded: 1 })
  t.match(app.backgroundTasks.stats, { succeeded: 1 })
})

t.test('a task that is sent or printed shows its id, name and state, and nothing that it was given', async t => {
  const task = new BackgroundTask(function named (_secret: string) {}, 'secret')
  const shown = { id: task.id, name: 'named', state: 'pending' }
  t.strictSame(JSON.parse(JSON.stringify(task)), shown)
  t.equal(inspect(task), `BackgroundTask ${inspect(shown)}`)
})

t.test('what is no task is refused: what was passed, and what is accepted', async t => {
  class Invoice {}
  const passed: Array<[args: unknown[], received: string]> = [
    [[], 'undefined'],
    [[undefined], 'undefined'],
    [[null], 'null'],
    [['x'], 'a string'],
    [[1, 2], 'a number'],
    [[true], 'a boolean'],
    [[1n], 'a bigint'],
    [[Symbol('x')], 'a symbol'],
    [[{}], 'an object (Object)'],
    [[[() => {}]], 'an object (Array)'],
    [[new Invoice()], 'an object (Invoice)'],
    [[Object.create(null)], 'an object (without a prototype)'],
    [[Promise.resolve()], 'a promise'],
    [[(async () => {})(), 'x'], 'a promise']
  ]
  await eachAdder(t, (t, addTask) => {
    for (const [args, received] of passed) {
      const error = thrownBy(() => addTask(...args))
      t.match(error, { code: 'FST_BGT_INVALID_TASK', statusCode: 500 })
      t.type(error, TypeError)
      t.equal(
        error.message,
        `addTask accepts a function followed by its arguments, a definition followed by its payload, or a BackgroundTask alone; received ${received}: pass the function itself, do not call it`
      )
    }
    const task = new BackgroundTask(() => {})
    t.throws(() => addTask(task, 1), { code: 'FST_BGT_INVALID_TASK', message: /a BackgroundTask followed by arguments/ })
    t.throws(() => addTask(task, undefined), { code: 'FST_BGT_INVALID_TASK' })
    t.equal(task.state, 'pending')
    t.equal(addTask(task), task, 'it can still be added')
  })
})

t.test('addCleanup and new BackgroundTask accept a function only, and say so', async t => {
  const app = await register(t)
  app.get('/', async request => {
    const addCleanup = request.backgroundTasks.addCleanup.bind(request.backgroundTasks) as Untyped
    for (const value of [undefined, null, 'x', {}, Promise.resolve(), new BackgroundTask(() => {})]) {
      const error = thrownBy(() => addCleanup(value))
      t.equal(error.code, 'FST_BGT_INVALID_TASK')
      t.match(error.message, /^addCleanup accepts a function followed by its arguments; received /)
    }
    return 'ok'
  })
  t.equal((await app.inject('/')).body, 'ok')

  const Untyped = BackgroundTask as unknown as new (...args: unknown[]) => unknown
  for (const value of [undefined, null, 'x', {}, Promise.resolve(), new BackgroundTask(() => {})]) {
    const error = thrownBy(() => new Untyped(value))
    t.equal(error.code, 'FST_BGT_INVALID_TASK')
    t.match(error.message, /^new BackgroundTask accepts a function followed by its arguments; received /)
  }
})

t.test('one BackgroundTask is added once', async t => {
  const refused = (name: string, found: string) => ({
    code: 'FST_BGT_INVALID_TASK',
    message: `addTask accepts a BackgroundTask once, and none that was run or cancelled; received "${name}", which is ${found}`
  })
  function brew (): void {}
  function fail (): void { throw new Error('spilled') }

  t.test('to one list', async t => {
    await eachAdder(t, (t, addTask) => {
      const task = new BackgroundTask(brew)
      addTask(task)
      t.throws(() => addTask(task), refused(task.name, 'on a list already'))
    })
  })

  t.test('to two lists', async t => {
    const app = await register(t)
    const task = new BackgroundTask(brew)
    app.get('/', async request => {
      request.backgroundTasks.addTask(task)
      return 'ok'
    })
    t.equal((await app.inject('/')).statusCode, 200)
    const second = await app.inject('/')
    t.equal(second.statusCode, 500)
    t.equal(second.json().code, 'FST_BGT_INVALID_TASK')
    await app.backgroundTasks.idle()
    t.throws(() => app.backgroundTasks.addTask(task), refused('brew', 'succeeded'))
  })

  t.test('and not while or after it runs by hand', async t => {
    const { backgroundTasks: tasks } = await register(t)
    const gate = newGate()
    const running = new BackgroundTask(function wait () { return gate.promise })
    const run = running.run()
    t.throws(() => tasks.addTask(running), refused('wait', 'running'))
    gate.resolve()
    await run
    t.throws(() => tasks.addTask(running), refused('wait', 'succeeded'))
    const failed = new BackgroundTask(fail)
    await t.rejects(failed.run(), { message: 'spilled' })
    t.throws(() => tasks.addTask(failed), refused('fail', 'failed'))
  })

  t.test('and not after cancel()', async t => {
    const { backgroundTasks: tasks } = await register(t)
    const task = new BackgroundTask(brew)
    t.equal(task.cancel(), true)
    t.throws(() => tasks.addTask(task), refused('brew', 'skipped'))
    const added = tasks.addTask(brew)
    added.cancel()
    t.throws(() => tasks.with({ name: 'again' }).addTask(added), refused('brew', 'skipped'))
  })

  t.test('nor run by hand when it is on a list, or a second time', async t => {
    const { backgroundTasks: tasks } = await register(t)
    const message = /^run accepts a BackgroundTask once/
    const task = tasks.addTask(brew)
    await t.rejects(task.run(), { code: 'FST_BGT_INVALID_TASK', message })
    await tasks.idle()
    t.equal(task.state, 'succeeded', 'the list has run it')
    await t.rejects(task.run(), { code: 'FST_BGT_INVALID_TASK', message })
  })
})

t.test('an invalid task after the close is still refused', async t => {
  const app = await register(t)
  await app.close()
  const addTask = app.backgroundTasks.addTask.bind(app.backgroundTasks) as Untyped
  t.throws(() => addTask('x'), { code: 'FST_BGT_INVALID_TASK' })
  t.throws(() => app.backgroundTasks.with({ timeout: 0 }), { code: 'FST_BGT_INVALID_OPTION' })
  t.equal(app.backgroundTasks.addTask(() => {}).state, 'abandoned')
})

t.test('with() refuses a wrong value at the call', async t => {
  const app = await register(t)
  const duration = 'a finite number of milliseconds above 0'
  const name = 'a string that is not empty'
  const both: Array<[options: unknown, message: string]> = [
    [undefined, 'with accepts an object of options; received undefined'],
    [null, 'with accepts an object of options; received null'],
    ['audit', 'with accepts an object of options; received \'audit\''],
    [() => {}, 'with accepts an object of options; received the function (anonymous)'],
    [{ timeout: 0 }, `The option "timeout" of with accepts ${duration}; received 0`],
    [{ timeout: '5s' }, `The option "timeout" of with accepts ${duration}; received '5s'`],
    [{ timeout: Infinity }, `The option "timeout" of with accepts ${duration}; received Infinity`],
    [{ timeout: null }, `The option "timeout" of with accepts ${duration}; received null`],
    [{ name: '' }, `The option "name" of with accepts ${name}; received ''`],
    [{ name: 1 }, `The option "name" of with accepts ${name}; received 1`],
    [{ name: null }, `The option "name" of with accepts ${name}; received null`]
  ]
  const refuses = (t: Test, tasks: { with: (options: never) => unknown, length: number }, table: typeof both): void => {
    const untyped = tasks.with.bind(tasks) as Untyped
    for (const [options, message] of table) {
      const error = thrownBy(() => untyped(options))
      t.match(error, { code: 'FST_BGT_INVALID_OPTION', statusCode: 500 })
      t.equal(error.message, message)
    }
    t.equal(tasks.length, 0)
  }

  t.test('of a request', async t => {
    app.get('/', async request => {
      const when = '\'success\', \'error\', \'always\' or a function of the outcome'
      refuses(t, request.backgroundTasks, [
        ...both,
        [{ when: 'never' }, `The option "when" of with accepts ${when}; received 'never'`],
        [{ when: null }, `The option "when" of with accepts ${when}; received null`],
        [{ retries: 3 }, 'with has no option "retries"; it accepts timeout, name, when']
      ])
      const { state, name } = request.backgroundTasks
        .with({ when: undefined, timeout: undefined, name: undefined }).addTask(function brew () {})
      return { state, name }
    })
    t.same((await app.inject('/')).json(), { state: 'pending', name: 'brew' })
    await app.backgroundTasks.idle()
  })

  t.test('of the app, which has no exchange for a `when`', async t => {
    refuses(t, app.backgroundTasks, [
      ...both,
      [{ when: 'always' }, 'The option "when" of with is for tasks of a request: those of the app have no exchange that could decide'],
      [{ retries: 3 }, 'with has no option "retries"; it accepts timeout, name']
    ])
  })
})

t.test('idle() refuses a wrong value', async t => {
  const { backgroundTasks: tasks } = await register(t)
  const idle = tasks.idle.bind(tasks) as (options?: unknown) => Promise<void>
  const rejection = (message: string) => ({ code: 'FST_BGT_INVALID_OPTION', message })
  const accepts = 'The option "rejectOnFailure" of idle accepts a boolean; received'
  await t.rejects(idle({ rejectOnFailure: 'yes' }), rejection(`${accepts} 'yes'`))
  await t.rejects(idle({ rejectOnFailure: null }), rejection(`${accepts} null`))
  await t.rejects(idle({ reject: true }), rejection('idle has no option "reject"; it accepts rejectOnFailure'))
  await t.rejects(idle(null), rejection('idle accepts an object of options; received null'))
  await t.rejects(idle(true), rejection('idle accepts an object of options; received true'))
  await t.resolves(idle({ rejectOnFailure: undefined }))
  await t.resolves(idle())
})

t.test('at maxPending a request gets 503 with Retry-After, until tasks have finished', async t => {
  const gate = newGate()
  const app = await register(t, { maxPending: 2 })
  app.get('/', async request => {
    request.backgroundTasks.addTask(() => gate.promise)
    return 'ok'
  })
  const url = await app.listen({ port: 0 })

  t.equal((await fetch(url)).status, 200)
  app.backgroundTasks.addTask(() => gate.promise)
  const refused = await fetch(url)
  t.equal(refused.status, 503)
  t.equal(refused.headers.get('retry-after'), '1')
  t.same(await refused.json(), {
    statusCode: 503,
    code: 'FST_BGT_OVERLOADED',
    error: 'Service Unavailable',
    message: 'No more background tasks are accepted: 2 have not finished, the limit set by maxPending is 2. Retry later'
  })
  t.equal(app.backgroundTasks.length, 2)

  gate.resolve()
  await app.backgroundTasks.idle()
  const accepted = await fetch(url)
  t.equal(accepted.status, 200)
  t.equal(accepted.headers.get('retry-after'), null)
})

t.test('a custom error handler', async t => {
  async function answer (t: Test, handler: Parameters<FastifyInstance['setErrorHandler']>[0]): Promise<Response> {
    const gate = newGate()
    const app = Fastify()
    await app.register(backgroundTasks, { maxPending: 1 })
    t.teardown(() => {
      gate.resolve()
      return app.close()
    })
    app.setErrorHandler(handler)
    app.get('/', async request => { request.backgroundTasks.addTask(() => {}) })
    app.backgroundTasks.addTask(() => gate.promise)
    const response = await fetch(await app.listen({ port: 0 }))
    await response.arrayBuffer()
    return response
  }

  t.test('that forgets the headers of the error, but sends the 503, sends Retry-After', async t => {
    const response = await answer(t, (_error, _request, reply) => { reply.code(503).send({ sorry: true }) })
    t.equal(response.status, 503)
    t.equal(response.headers.get('retry-after'), '1')
  })

  t.test('that is asynchronous, too', async t => {
    const response = await answer(t, async (_error, _request, reply) => {
      reply.code(503)
      return { sorry: true }
    })
    t.equal(response.status, 503)
    t.equal(response.headers.get('retry-after'), '1')
  })

  t.test('that sends the error has it from there', async t => {
    const response = await answer(t, (error, _request, reply) => { reply.send(error) })
    t.equal(response.status, 503)
    t.equal(response.headers.get('retry-after'), '1')
  })

  t.test('keeps a Retry-After of its own', async t => {
    const response = await answer(t, (_error, _request, reply) => { reply.code(503).header('retry-after', '30').send('later') })
    t.equal(response.headers.get('retry-after'), '30')
  })

  t.test('that answers otherwise sends none', async t => {
    const response = await answer(t, (_error, _request, reply) => { reply.code(200).send('no task, but fine') })
    t.equal(response.status, 200)
    t.equal(response.headers.get('retry-after'), null)
  })
})

t.test('a BackgroundTask that was refused at maxPending can be added later', async t => {
  const { backgroundTasks: tasks } = await register(t, { maxPending: 1 })
  tasks.addTask(() => {})
  const task = new BackgroundTask(() => {})
  t.throws(() => tasks.addTask(task), { code: 'FST_BGT_OVERLOADED', statusCode: 503, headers: { 'retry-after': '1' } })
  t.equal(task.state, 'pending')
  await tasks.idle()
  tasks.addTask(task)
  await tasks.idle()
  t.equal(task.state, 'succeeded')
})

t.test('cleanups do not count for maxPending', async t => {
  const app = await register(t, { maxPending: 1 })
  app.get('/', async request => {
    request.backgroundTasks.addCleanup(() => {})
    request.backgroundTasks.addTask(() => {})
    request.backgroundTasks.addCleanup(() => {})
    return 'ok'
  })
  t.equal((await app.inject('/')).statusCode, 200)
  await app.backgroundTasks.idle()
})

t.test('error messages never hold what was passed as a task or an argument', async t => {
  const secret = 's3cret'
  const { backgroundTasks: tasks } = await register(t, { maxPending: 1 })
  const task = new BackgroundTask((word: string) => word, secret)
  const passed: unknown[][] = [
    [secret],
    [[secret]],
    [{ password: secret }],
    [{ [secret]: 1 }],
    [{ constructor: { name: secret } }],
    [{ toString: () => secret, [inspect.custom]: () => secret }],
    [new Error(secret)],
    [Buffer.from(secret)],
    [Symbol(secret)],
    [Promise.resolve(secret)],
    [undefined, secret],
    [task, secret]
  ]
  const addTask = tasks.addTask.bind(tasks) as Untyped
  for (const args of passed) {
    const error = thrownBy(() => addTask(...args))
    t.equal(error.code, 'FST_BGT_INVALID_TASK')
    t.notOk(`${error.message} ${inspect(error)}`.includes(secret), error.message)
  }
  task.cancel()
  t.notOk(thrownBy(() => tasks.addTask(task)).message.includes(secret))
  tasks.addTask(() => {})
  t.notOk(thrownBy(() => tasks.addTask(String, secret)).message.includes(secret))
})

t.test('an object whose constructor cannot be read is refused like any other', async t => {
  const { backgroundTasks: tasks } = await register(t)
  const addTask = tasks.addTask.bind(tasks) as Untyped
  const hostile = { get constructor () { throw new Error('hostile') } }
  t.throws(() => addTask(hostile), { code: 'FST_BGT_INVALID_TASK' })
})

/** Tasks that wait for `promise` run until `resolve` is called. */
function newGate (): { promise: Promise<void>, resolve: () => void } {
  let resolve = (): void => {}
  const promise = new Promise<void>(_resolve => { resolve = _resolve })
  return { promise, resolve }
}

/** An app with the plugin. What the test passes is not typed: most of it is wrong. */
async function register (t: Test, options: object = {}): Promise<FastifyInstance> {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(backgroundTasks, options)
  return app
}

async function refusalOf (promise: Promise<unknown>): Promise<Refusal> {
  try {
    await promise
  } catch (error) {
    return error as Refusal
  }
  throw new Error('it was accepted')
}

function thrownBy (call: () => unknown): Refusal {
  try {
    call()
  } catch (error) {
    return error as Refusal
  }
  throw new Error('it was accepted')
}

/** Everything that has an `addTask`: a request and the app, and both with() options. */
async function eachAdder (t: Test, check: (t: Test, addTask: Untyped) => void): Promise<void> {
  const app = await register(t)
  const checkBoth = (t: Test, tasks: FastifyInstance['backgroundTasks'] | FastifyRequest['backgroundTasks']): void => {
    check(t, tasks.addTask.bind(tasks) as Untyped)
    check(t, tasks.with({ name: 'named' }).addTask as Untyped)
  }
  await t.test('of a request', async t => {
    app.get('/', async request => {
      checkBoth(t, request.backgroundTasks)
      return 'ok'
    })
    t.equal((await app.inject('/')).body, 'ok')
  })
  await t.test('of the app', async t => { checkBoth(t, app.backgroundTasks) })
  await app.backgroundTasks.idle()
}

async function runOne (tasks: FastifyInstance['backgroundTasks']): Promise<string> {
  const task = tasks.addTask(() => {})
  await tasks.idle()
  return task.state
}
