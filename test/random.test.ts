/**
 * Random requests to two apps of one process, one over HTTP/1.1 and one over HTTP/2, by clients that stay or leave, with hostile code
 * in every place, held against a model. A failure names its seed: `SEED=<seed> npx tap test/random.test.ts` sends the same requests.
 */
import t, { type Test } from 'tap'
import Fastify, { type FastifyInstance, type FastifyRequest, type FastifyServerOptions } from 'fastify'
import { deferred } from './support/app.js'
import { watchFaults, watchWarnings } from './support/faults.js'
import { connect, forkOf, hostile, hostileLogger, OPTIONS, pick, Program, randomOf, turns, Unit, type Planned, type Random, type Visitors } from './support/random.js'

const SEED = Number(process.env['SEED'] ?? 20261128)
const REQUESTS = 320
const AT_ONCE = 20
/** Of the last requests, which are on their way when the apps close. */
const LAST = 16

interface Built {
  app: FastifyInstance
  units: Unit[]
  /** Where requests go. */
  scopes: Array<{ unit: Unit, prefix: string }>
  closing: Promise<void>
}

/** An app whose children have registrations of their own, or share that of their parent. */
async function build (t: Test, isHttp2: boolean, isShared: boolean, random: Random, programs: Map<number, Program>, gate: Promise<void>): Promise<Built> {
  const lines = new Map<string, number>()
  const units: Unit[] = []
  const scopes: Built['scopes'] = []
  const closing = deferred()
  // What is asked while requests run has generators of its own, so that the requests are the same in each run.
  const loggerInstance = hostileLogger(forkOf(SEED, 'logger'), (message, { task }) => {
    // `waitUntil` fails inside of `addTask`, when the model has not counted the task yet.
    for (const unit of units) if (!message.startsWith('waitUntil')) unit.sample()
    if (message === 'background task failed' && task !== undefined) lines.set(task.id, (lines.get(task.id) ?? 0) + 1)
  })
  const app = Fastify({ ...isHttp2 && { http2: true }, loggerInstance, forceCloseConnections: false } as FastifyServerOptions)
  t.teardown(() => app.close())
  app.addHook('preClose', async () => { closing.resolve() })
  const register = async (instance: FastifyInstance): Promise<Unit> => {
    const unit = new Unit(instance, pick(OPTIONS, random), units.length === 0 && !isHttp2, lines)
    await unit.register(forkOf(SEED, 'onError'))
    units.push(unit)
    return unit
  }
  const programOf = (request: FastifyRequest): Program => programs.get(Number(/(\d+)(?:\?|$)/.exec(request.raw.url ?? '')?.[1])) as Program
  const addRoutes = (instance: FastifyInstance, unit: Unit): void => {
    scopes.push({ unit, prefix: instance.prefix })
    const handle = function (request: FastifyRequest): unknown { return programOf(request).handle() }
    instance.route({ method: ['GET', 'POST'], url: '/:seed', handler: handle })
    instance.route({ method: ['GET', 'POST'], url: '/valid/:seed', schema: { querystring: { type: 'object', properties: { n: { type: 'integer' } } } }, handler: handle })
    instance.setNotFoundHandler(async (request, reply) => {
      void reply.code(404)
      return await (programOf(request).handle() as Promise<string>)
    })
  }
  const addHooks = (instance: FastifyInstance): void => {
    instance.addHook('onRequest', async (request, reply) => {
      const program = programOf(request)
      program.begin(request, reply)
      if (program.isGated) await gate
      await program.track(program.hooks.onRequest())
    })
    instance.addHook('preHandler', async request => { await programOf(request).track(programOf(request).hooks.preHandler()) })
    instance.addHook('preHandler', (request, _reply, done) => { programOf(request).rawInHook(done) })
    instance.addHook('onError', async (request, _reply, error) => { await programOf(request).track(programOf(request).hooks.onError(error)) })
    instance.addHook('onSend', async request => { await programOf(request).track(programOf(request).hooks.onSend()) })
    instance.addHook('onResponse', async request => { await programOf(request).track(programOf(request).hooks.onResponse()) })
    instance.addHook('onRequestAbort', async request => { await programOf(request).track(programOf(request).hooks.onRequestAbort()) })
  }
  const parent = isShared ? await register(app) : undefined
  for (const prefix of ['/a', '/b']) {
    await app.register(async child => {
      const unit = parent ?? await register(child)
      addHooks(child)
      addRoutes(child, unit)
      await child.register(async grandchild => {
        grandchild.setErrorHandler((_error, request) => programOf(request).handleError())
        addRoutes(grandchild, unit)
      }, { prefix: '/in' })
    }, { prefix })
  }
  // Whoever is beside the children has what their parent has.
  app.get('/plain', async request => request.backgroundTasks === undefined)
  const { payload } = await app.inject('/plain')
  t.equal(payload, String(parent === undefined), `SEED=${SEED}: a route beside the children`)
  return { app, units, scopes, closing: closing.promise }
}

t.test(`random requests, SEED=${SEED}`, async t => {
  const [faults, warnings] = [watchFaults(t), watchWarnings(t)]
  const random = randomOf(SEED)
  const programs = new Map<number, Program>()
  const gate = deferred()
  // In one of the apps the children have registrations of their own.
  const isShared = random(2) === 0
  const built = [await build(t, false, isShared, random, programs, gate.promise), await build(t, true, !isShared, random, programs, gate.promise)]
  const visitors = await Promise.all(built.map(async ({ app }, i) => await connect(app, i === 1)))
  t.teardown(() => { for (const { close } of visitors) close() })
  const units = built.flatMap(({ units }) => units)
  let last = 0

  const start = (isGated: boolean): Program => {
    const which = random(2)
    const { unit, prefix } = pick((built[which] as Built).scopes, random)
    const program = new Program(unit, SEED * 1_000 + last++, isGated)
    programs.set(program.seed, program)
    program.send(visitors[which] as Visitors, prefix)
    return program
  }
  const settle = async (batch: Program[]): Promise<void> => {
    await Promise.all(batch.map(async ({ visitor }) => await visitor.ended))
    let seen: number
    do {
      seen = units.reduce((sum, { accepted }) => sum + accepted, 0) + batch.reduce((sum, { work }) => sum + work.length, 0)
      await Promise.allSettled(batch.flatMap(({ work }) => work))
      await Promise.all(units.map(async ({ instance }) => { await instance.backgroundTasks.idle() }))
      await turns(20)
    } while (seen !== units.reduce((sum, { accepted }) => sum + accepted, 0) + batch.reduce((sum, { work }) => sum + work.length, 0))
    for (const program of batch) {
      for (const problem of await program.check()) t.fail(`SEED=${SEED}, request ${program.seed}: ${program.words}: ${problem}`)
    }
  }

  for (let sent = 0; sent < REQUESTS; sent += AT_ONCE) {
    const batch = Array.from({ length: AT_ONCE }, () => start(false))
    // Whoever waits in between is told of failures or not, and goes on.
    const rejecting = Promise.allSettled(units.map(({ instance }) => instance.backgroundTasks.idle({ rejectOnFailure: true })))
    await settle(batch)
    await rejecting
  }
  const batch = Array.from({ length: LAST }, () => start(true))
  await Promise.all(batch.map(async ({ entered }) => { await entered.promise }))
  const closed = Promise.all(built.map(async ({ app }) => { await app.close() }))
  await Promise.all(built.map(async ({ closing }) => { await closing }))
  gate.resolve()
  await settle(batch)
  // A server waits for connections that are kept alive.
  for (const { close } of visitors) close()
  await closed

  for (const unit of units) {
    const { instance, planned, problems, cleanupsFailed, cleanupsHeard } = unit
    const states: Record<string, number> = { pending: 0, running: 0, succeeded: 0, failed: 0, skipped: 0, abandoned: 0, enqueued: 0, oldestPendingMs: 0 }
    for (const { task } of planned) states[task.state] = (states[task.state] ?? 0) + 1
    const name = `SEED=${SEED}, ${instance.prefix || 'root'} ${JSON.stringify(Object.keys(unit.options))}`
    t.strictSame(instance.backgroundTasks.stats, states, `${name}: ${planned.length} tasks`)
    t.strictSame([...problems], [], `${name}: the counts`)
    t.equal(cleanupsHeard, cleanupsFailed, `${name}: failed cleanups`)
    for (const [key, ran] of keysOf(planned)) t.ok(ran <= 1, `${name}: the tasks of ${key} have run ${ran} times`)
    t.equal(instance.backgroundTasks.addTask(hostile).state, 'abandoned', `${name}: behind the close`)
  }
  const sum = units.reduce((sum, { accepted }) => sum + accepted, 0)
  t.ok(sum > 3 * REQUESTS, `SEED=${SEED}: ${sum} tasks were accepted`)
  t.strictSame([faults, warnings], [[], []], `SEED=${SEED}: faults and warnings`)
})

/** How many tasks of each key have run to their end. */
function keysOf (planned: Planned[]): Map<string, number> {
  const ran = new Map<string, number>()
  for (const { job, key, task } of planned) {
    if (key === undefined || (task.state !== 'succeeded' && task.state !== 'failed')) continue
    ran.set(`${String(job)} ${key}`, (ran.get(`${String(job)} ${key}`) ?? 0) + 1)
  }
  return ran
}
