/**
 * Random programs of tasks over random endings of exchanges, held against a small model. A failure names its seed:
 * `SEED=<seed> PROGRAMS=1 npx tap test/model.test.ts` runs that program by itself.
 */
import t from 'tap'
import http from 'node:http'
import { Readable } from 'node:stream'
import { setImmediate as turn } from 'node:timers/promises'
import type { FastifyReply, FastifyRequest } from 'fastify'
import type { BackgroundTask, BackgroundTasks, FastifyBackgroundTasksOptions, TaskCondition } from '../lib/index.js'
import { start } from './support/app.js'
import { randomOf, type Random } from './support/random.js'

const PROGRAMS = Number(process.env['PROGRAMS'] ?? 4000)
const SEED = Number(process.env['SEED'] ?? Math.floor(Math.random() * 1e9))
const AT_ONCE = 25

const APPS: FastifyBackgroundTasksOptions[] = [{}, { stopOnError: true }, { concurrency: 3 }, { when: 'always', onError: async () => { await turn() } }]
const ENDINGS = [
  'reply', 'status', 'throw', 'throw undefined', 'send', 'send error', 'hijack', 'stream', 'failing stream',
  'abort, reply', 'abort, throw', 'abort, undefined', 'abort, hijack', 'abort, send'
] as const
const FAILED = new Set(['throw', 'throw undefined', 'send error', 'abort, throw'])
const KINDS = ['sync', 'async', 'throw', 'reject', 'nest', 'nest async'] as const
const CONDITIONS = [undefined, undefined, undefined, 'success', 'error', 'always', 'function', 'throwing'] as const

type Condition = typeof CONDITIONS[number]

interface Planned {
  task: BackgroundTask
  kind: typeof KINDS[number]
  condition: Condition
  cancelled: boolean
  starts: number
}

/** One request: what it added, in order, and what of it ran. */
class Program {
  readonly planned: Planned[] = []
  readonly ran: Planned[] = []
  readonly problems: string[] = []
  cleanups = 0
  cleanupsRun = 0
  lateLeft: number
  list: BackgroundTasks | undefined
  readonly ending: typeof ENDINGS[number]
  readonly #random: Random
  #running = 0

  constructor (seed: number) {
    this.#random = randomOf(seed)
    this.ending = pick(ENDINGS, this.#random)
    this.lateLeft = this.#random(3)
  }

  addSome (list: BackgroundTasks, depth = 0): void {
    this.list = list
    for (let i = this.#random(depth === 0 ? 5 : 3); i > 0; i--) this.#add(list, depth)
    if (this.#random(3) === 0) this.#addCleanup(list)
  }

  async endExchange (request: FastifyRequest, reply: FastifyReply): Promise<unknown> {
    if (this.#random(2) === 0) await turn()
    if (this.ending.startsWith('abort')) {
      const gone = new Promise(resolve => { request.raw.socket.once('close', resolve) })
      request.raw.socket.destroy()
      await gone
      this.addSome(request.backgroundTasks)
      if (this.#random(2) === 0) await turn()
    }
    this.#addLate(request.backgroundTasks)
    switch (this.ending) {
      case 'status': return await reply.code(404).send('by hand')
      case 'throw': case 'abort, throw': throw new Error('handler')
      case 'throw undefined': throw undefined // eslint-disable-line no-throw-literal
      case 'send error': reply.send(new Error('handler')); return await reply
      case 'send': case 'abort, send': setImmediate(() => reply.send('sent')); return await reply
      case 'hijack': case 'abort, hijack': reply.hijack().raw.end('hijacked'); return
      case 'stream': return Readable.from(['a', 'b'])
      case 'failing stream': return Readable.from((async function * () { yield 'a'; await turn(); throw new Error('stream') })())
      case 'abort, undefined': return
      default: return 'reply'
    }
  }

  /** Adds more once the exchange may have ended. */
  #addLate (list: BackgroundTasks): void {
    if (this.lateLeft === 0) return
    setImmediate(() => {
      setImmediate(() => {
        this.lateLeft--
        this.addSome(list)
        this.#addLate(list)
      })
    })
  }

  #add (list: BackgroundTasks, depth: number): void {
    const kind = pick(KINDS, this.#random)
    const condition = pick(CONDITIONS, this.#random)
    // The task is known before it can run.
    const planned = { kind, condition, cancelled: false, starts: 0 } as unknown as Planned
    const when = conditionOf(condition)
    const adder = when === undefined ? list : list.with({ when })
    planned.task = adder.addTask((p: Planned) => this.#run(p, list, depth), planned)
    this.planned.push(planned)
    // Its own, or another one: started, ended, or still waiting.
    const victim = this.#random(2) === 0 ? planned : pick(this.planned, this.#random)
    if (this.#random(6) === 0) victim.cancelled ||= victim.task.cancel()
  }

  #run (planned: Planned, list: BackgroundTasks, depth: number): unknown {
    planned.starts++
    this.ran.push(planned)
    if (this.#running++ > 0) this.problems.push('two at once')
    if (list.outcome === undefined) this.problems.push('started before the exchange ended')
    if (planned.task.state !== 'running') this.problems.push(`runs in state ${planned.task.state}`)
    const end = (): void => { this.#running-- }
    switch (planned.kind) {
      case 'sync': end(); return 'value'
      case 'throw': end(); throw new Error('task')
      case 'nest': if (depth < 3) this.addSome(list, depth + 1); end(); return undefined
      default: return this.#runAsync(planned, list, depth).finally(end)
    }
  }

  async #runAsync (planned: Planned, list: BackgroundTasks, depth: number): Promise<void> {
    for (let i = this.#random(3); i > 0; i--) await turn()
    if (planned.kind === 'reject') throw new Error('task')
    if (planned.kind === 'nest async' && depth < 3) this.addSome(list, depth + 1)
  }

  #addCleanup (list: BackgroundTasks): void {
    this.cleanups++
    let ran = false
    list.addCleanup(async () => {
      if (ran) this.problems.push('a cleanup ran twice')
      ran = true
      this.cleanupsRun++
      const unfinished = this.planned.filter(({ task }) => task.state === 'pending' || task.state === 'running')
      if (unfinished.length > 0 || this.#running > 0) this.problems.push('a cleanup ran before the last task')
      if (this.#random(2) === 0) await turn()
      if (this.#random(2) === 0) throw new Error('cleanup')
    })
  }

  /** The model: what each task must have become, by the outcome and what came before it. */
  check ({ when = 'success', stopOnError = false }: FastifyBackgroundTasksOptions): string[] {
    const outcome = this.list?.outcome
    if (this.list === undefined) return this.problems
    if (outcome === undefined) return [...this.problems, 'the exchange has not ended']
    if (outcome.failed !== FAILED.has(this.ending)) this.problems.push(`failed is ${String(outcome.failed)}`)
    const aborted = this.ending.startsWith('abort') || this.ending === 'failing stream'
    if (outcome.aborted !== aborted) this.problems.push(`aborted is ${String(outcome.aborted)}`)
    let stopped = false
    for (const { task, kind, condition, cancelled, starts } of this.planned) {
      let expected: string
      const effective = condition ?? when
      if (cancelled || stopped) expected = 'skipped'
      else if (condition === 'throwing') expected = 'failed'
      else if (effective === 'always' || effective === 'function' || (effective === 'error') === outcome.failed) {
        expected = kind === 'throw' || kind === 'reject' ? 'failed' : 'succeeded'
      } else expected = 'skipped'
      if (task.state !== expected) this.problems.push(`a ${kind} task is ${task.state}, not ${expected}`)
      const shouldStart = expected === 'succeeded' || (expected === 'failed' && condition !== 'throwing')
      if (starts !== (shouldStart ? 1 : 0)) this.problems.push(`a ${kind} task started ${starts} times`)
      if (expected === 'failed' && stopOnError) stopped = true
    }
    const started = this.planned.filter(({ starts }) => starts > 0)
    if (started.some((planned, i) => planned !== this.ran[i])) this.problems.push('out of order')
    if (this.cleanupsRun !== this.cleanups) this.problems.push(`${this.cleanupsRun} of ${this.cleanups} cleanups ran`)
    if (this.list.length !== 0) this.problems.push(`length is ${this.list.length}`)
    return this.problems
  }
}

t.test(`random programs, from seed ${SEED}`, async t => {
  for (const [index, options] of APPS.entries()) {
    const { app, address } = await start(t, options)
    app.log.level = 'silent'
    const programs = new Map<string, Program>()
    const programOf = (request: FastifyRequest): Program => programs.get((request.params as { seed: string }).seed) as Program
    app.addHook('preHandler', async request => {
      if (Number((request.params as { seed: string }).seed) % 2 === 0) programOf(request).addSome(request.backgroundTasks)
    })
    app.get('/:seed', async (request, reply) => {
      const program = programOf(request)
      program.addSome(request.backgroundTasks)
      return await program.endExchange(request, reply)
    })
    const url = await address()
    const agent = new http.Agent({ keepAlive: true })
    t.teardown(() => { agent.destroy() })
    const mine = Array.from({ length: PROGRAMS }, (_, i) => SEED + i).filter(seed => seed % APPS.length === index)
    const expected = { total: 0 }
    while (mine.length > 0) {
      await Promise.all(mine.splice(0, AT_ONCE).map(async seed => {
        programs.set(String(seed), new Program(seed))
        await request(`${url}/${seed}`, agent)
      }))
      for (const program of programs.values()) while (program.lateLeft > 0) await turn()
      await app.backgroundTasks.idle()
      for (const [seed, program] of programs) {
        const problems = program.check(options)
        if (problems.length > 0) t.fail(`seed ${seed}, ending "${program.ending}": ${[...new Set(problems)].join('; ')}`)
        expected.total += program.planned.length
      }
      programs.clear()
    }
    const { pending, running, succeeded, failed, skipped, abandoned, oldestPendingMs } = app.backgroundTasks.stats
    t.equal(succeeded + failed + skipped, expected.total, `${JSON.stringify(options)}: ${expected.total} tasks`)
    t.strictSame({ pending, running, abandoned, oldestPendingMs }, { pending: 0, running: 0, abandoned: 0, oldestPendingMs: 0 })
  }
})

/** Resolves when the exchange is over for the client, one way or another. */
async function request (url: string, agent: http.Agent): Promise<void> {
  await new Promise<void>(resolve => {
    http.get(url, { agent }, response => {
      response.on('error', () => {})
      response.on('close', resolve)
      response.resume()
    }).on('error', () => { resolve() })
  })
}

function conditionOf (condition: Condition): TaskCondition | undefined {
  if (condition === 'function') return outcome => outcome.statusCode > 0
  if (condition === 'throwing') return () => { throw new Error('when') }
  return condition
}

function pick<T> (from: readonly T[], random: Random): T {
  return from[random(from.length)] as T
}
