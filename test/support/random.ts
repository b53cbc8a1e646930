/**
 * For the random test of two apps: a seeded generator, hostile values, a logger that throws, clients that leave at an event, and the
 * model: registrations, requests and tasks.
 */
import { AsyncLocalStorage } from 'node:async_hooks'
import { once } from 'node:events'
import http from 'node:http'
import http2 from 'node:http2'
import type { AddressInfo } from 'node:net'
import { Readable } from 'node:stream'
import { setImmediate as turn } from 'node:timers/promises'
import vm from 'node:vm'
import type { FastifyBaseLogger, FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import backgroundTasks, {
  BackgroundTask, defineTask, type BackgroundTasks, type ExchangeOutcome, type FastifyBackgroundTasksOptions, type TaskAdder, type TaskContext
} from '../../lib/index.js'
import { deferred } from './app.js'

/** A number below the one given. */
export type Random = (below: number) => number

/** mulberry32: small, seeded, and good enough to choose test programs. */
export function randomOf (seed: number): Random {
  let state = seed
  return below => {
    state = (state + 0x6D2B79F5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below
  }
}

/** A generator of its own for each place, so that what one place chooses does not depend on the order in which places are reached. */
export function forkOf (seed: number, place: string): Random {
  let hash = seed | 0
  for (let i = 0; i < place.length; i++) hash = Math.imul(hash ^ place.charCodeAt(i), 0x01000193)
  return randomOf(hash)
}

export function pick<T> (from: readonly T[], random: Random): T {
  return from[random(from.length)] as T
}

export const hostile = (): never => { throw new Error('hostile') }

const spoilt = (key: string): Error => Object.defineProperty(new Error('spoilt'), key, { get: hostile })

/** What Fastify itself can be given, too. */
const thrown: ReadonlyArray<() => unknown> = [
  () => new Error('plain'),
  () => undefined,
  () => vm.runInNewContext('Object.assign(new TypeError("realm"), { code: "E1" })') as unknown,
  () => Object.freeze(new RangeError('frozen'))
]

/** What a task may throw. */
const errors: ReadonlyArray<() => unknown> = [
  ...thrown,
  () => spoilt('message'), () => spoilt('name'), () => spoilt('code'), () => spoilt('stack'), () => spoilt('cause'),
  () => revoked(),
  () => new Proxy(new Error('traps'), { get: hostile, has: hostile, getPrototypeOf: hostile, ownKeys: hostile, getOwnPropertyDescriptor: hostile }),
  () => Object.create(null) as unknown,
  () => spoilt('then'),
  () => null,
  () => Symbol('thrown'),
  () => 1n
]

function revoked (): object {
  const { proxy, revoke } = Proxy.revocable({}, {})
  revoke()
  return proxy
}

/** A query that runs with each call of `then`. */
class Lazy implements PromiseLike<unknown> {
  calls = 0
  readonly #run: () => Promise<unknown>

  constructor (run: () => Promise<unknown>) {
    this.#run = run
  }

  then<A, B> (resolve?: ((value: unknown) => A | PromiseLike<A>) | null, reject?: ((reason: unknown) => B | PromiseLike<B>) | null): Promise<A | B> {
    this.calls++
    return this.#run().then(resolve, reject)
  }
}

/** A function of another realm, whose promise is of that realm. */
const inRealm = vm.runInNewContext('async (fn, ...args) => await fn(...args)') as (fn: (...args: never[]) => unknown, ...args: unknown[]) => Promise<unknown>

export async function turns (count: number): Promise<void> {
  for (; count > 0; count--) await turn()
}

const LEVELS = ['fatal', 'error', 'warn', 'info', 'debug', 'trace'] as const

/** What the plugin says; Fastify's own lines are left alone, for it has no answer to a logger that throws. */
const OF_PLUGIN = /background task|^onError of|^onFailed of|^waitUntil/

/** A logger that tells of each line of the plugin, and throws then, sometimes. */
export function hostileLogger (random: Random, noted: (message: string, bindings: { task?: { id: string } }) => void): FastifyBaseLogger {
  const line = (bindings: unknown, message: unknown): void => {
    if (typeof message !== 'string' || !OF_PLUGIN.test(message)) return
    noted(message, bindings as { task?: { id: string } })
    if (random(3) === 0) hostile()
  }
  const logger = { level: 'trace', silent () {}, child: () => logger, ...Object.fromEntries(LEVELS.map(level => [level, line])) }
  return logger as unknown as FastifyBaseLogger
}

/** A request's logger, no method of which can be read. */
function unreadableLogger (): FastifyBaseLogger {
  const logger = {}
  for (const key of [...LEVELS, 'child', 'isLevelEnabled', 'level']) Object.defineProperty(logger, key, { get: hostile })
  return logger as FastifyBaseLogger
}

export interface Sent {
  readonly path: string
  readonly method: string
  readonly body: string | undefined
  /** What the client waits for until it leaves by itself. */
  readonly leavesAt: string | undefined
  /** Whether only a part of the body is sent, and the request never ends. */
  readonly isCut: boolean
  /** Whether it has a connection of its own. */
  readonly isAlone: boolean
}

export interface Visitor {
  leave: () => void
  /** Resolves when the exchange is over for the client, to the status of an answer that it has read to its end. */
  readonly ended: Promise<number | undefined>
}

/** Those who send requests to an app. */
export interface Visitors {
  send: (sent: Sent) => Visitor
  /** Closes the connections that they have kept. */
  close: () => void
}

export async function connect (app: FastifyInstance, isHttp2: boolean): Promise<Visitors> {
  await app.listen({ host: '127.0.0.1', port: 0 })
  const { port } = app.server.address() as AddressInfo
  return isHttp2 ? visitBySession(port) : visitBySocket(port)
}

function visitBySocket (port: number): Visitors {
  const agent = new http.Agent({ keepAlive: true })
  const send: Visitors['send'] = ({ path, method, body, leavesAt, isCut, isAlone }) => {
    const headers = body === undefined ? {} : { 'content-type': 'text/plain', 'content-length': isCut ? 2 * body.length : body.length }
    const request = http.request({ host: '127.0.0.1', port, path, method, headers, agent: isAlone ? false : agent })
    const leave = (): void => { request.destroy() }
    const ended = new Promise<number | undefined>(resolve => {
      let hasAnswer = false
      request.on('error', () => {}).on('close', () => { if (!hasAnswer) resolve(undefined) })
      request.on('response', response => {
        hasAnswer = true
        response.on('error', () => {}).on('close', () => { resolve(response.complete ? response.statusCode : undefined) })
        if (leavesAt === 'data') response.once('data', leave)
        response.resume()
        if (leavesAt === 'headers') leave()
      })
    })
    if (isCut) request.write(body)
    else request.end(body)
    return { leave, ended }
  }
  return { send, close: () => { agent.destroy() } }
}

function visitBySession (port: number): Visitors {
  const open = (): http2.ClientHttp2Session => http2.connect(`http://127.0.0.1:${port}`).on('error', () => {})
  let shared = open()
  const send: Visitors['send'] = ({ path, method, body, leavesAt, isCut, isAlone }) => {
    if (shared.closed || shared.destroyed) shared = open()
    const session = isAlone ? open() : shared
    const headers = body === undefined ? {} : { 'content-type': 'text/plain', 'content-length': isCut ? 2 * body.length : body.length }
    const stream = session.request({ ':path': path, ':method': method, ...headers }, { endStream: body === undefined })
    const leave = (): void => {
      if (isAlone) session.destroy()
      else stream.close(http2.constants.NGHTTP2_CANCEL)
    }
    let status: number | undefined
    let hasEnded = false
    const ended = new Promise<number | undefined>(resolve => {
      stream.on('error', () => {})
      stream.on('end', () => { hasEnded = true })
      stream.on('response', headers => {
        status = headers[':status']
        if (leavesAt === 'headers') leave()
      })
      if (leavesAt === 'data') stream.once('data', leave)
      stream.on('close', () => {
        if (isAlone) session.close()
        resolve(hasEnded && stream.rstCode === 0 ? status : undefined)
      })
      stream.resume()
    })
    if (isCut) stream.write(body)
    else if (body !== undefined) stream.end(body)
    return { leave, ended }
  }
  return { send, close: () => { shared.destroy() } }
}

export const OPTIONS: FastifyBackgroundTasksOptions[] = [{}, { stopOnError: true }, { concurrency: 2 }, { when: 'always', waitUntil: hostile }, { timeout: 60_000, slowTask: 60_000 }]
/** Endings that fail, by what they do; the client may have left by then. */
const FAILING = ['throw', 'sync throw', 'send error', 'callback error', 'onRequest fails', 'preHandler fails', 'onSend fails', 'invalid'] as const
const ENDINGS = [
  'async', 'status', 'sync', 'callback', 'returned reply', 'lazy', 'undefined', 'hijack', 'async hijack', 'stream', 'web stream', 'broken stream',
  'endless stream', 'raw', 'raw in a hook', 'events', 'not found', ...FAILING
] as const
const SERVER_POINTS = ['onRequest', 'preHandler', 'handler', 'onSend'] as const
const KINDS = [
  'sync', 'async', 'throw', 'reject', 'lazy', 'failing lazy', 'then throws', 'then cannot be read', 'then settles twice', 'revoked', 'odd', 'nest',
  'async nest', 'realm', 'failing realm', 'nameless', 'proxy', 'made elsewhere', 'of the app', 'cancels', 'cleans up', 'job', 'job', 'job', 'job', 'job'
] as const
const FAILING_KINDS = new Set<string>(['throw', 'reject', 'failing lazy', 'then throws', 'then cannot be read', 'revoked', 'failing realm'])
const CONDITIONS = [
  undefined, undefined, undefined, undefined, 'success', 'error', 'always', 'yes', 'no', 'throws', 'promise', 'cancels', 'cancels and throws'
] as const
const JOBS = ['flaky', 'slow', 'once', 'picky', 'always'] as const

const storage = new AsyncLocalStorage<Planned>()
const all = new Map<string, Planned>()
const handler = (payload: { id: string }, context: TaskContext): unknown => (all.get(payload.id) as Planned).attempt(context)
const onFailed = ({ id }: { id: string }, error: unknown): Promise<void> => (all.get(id) as Planned).hearLast(error)
const common = { handler, onFailed }
const definitions = {
  flaky: defineTask({ name: 'flaky', retry: { attempts: 3, backoff: { type: 'fixed', delay: 0 } }, ...common }),
  slow: defineTask({ name: 'slow', retry: { attempts: 3, backoff: { delay: 1 } }, ...common }),
  once: defineTask<{ id: string }>({ name: 'once', retry: { attempts: 1 }, payload: { type: 'object', required: ['id'] }, ...common }),
  picky: defineTask({ name: 'picky', retry: { attempts: 3, backoff: { delay: 0 }, when: error => (error as { planned: Planned }).planned.answerRetry() }, ...common }),
  always: defineTask({ name: 'always', when: 'always', retry: { attempts: 2, backoff: { delay: 0 } }, ...common }),
  /** Only the first registration has it. */
  first: defineTask({ name: 'first', handler: hostile })
}

/** One registration of the plugin, and what the model knows of it. */
export class Unit {
  readonly instance: FastifyInstance
  readonly options: FastifyBackgroundTasksOptions
  readonly hasFirst: boolean
  readonly planned: Planned[] = []
  readonly problems = new Set<string>()
  readonly heard = new Map<BackgroundTask, number>()
  readonly lines: Map<string, number>
  accepted = 0
  running = 0
  cleanupsFailed = 0
  cleanupsHeard = 0

  constructor (instance: FastifyInstance, options: FastifyBackgroundTasksOptions, hasFirst: boolean, lines: Map<string, number>) {
    this.instance = instance
    this.options = options
    this.hasFirst = hasFirst
    this.lines = lines
  }

  async register (random: Random): Promise<void> {
    const { first, ...others } = definitions
    const onError = (error: unknown, task: BackgroundTask): Promise<void> | undefined => {
      this.sample()
      this.heard.set(task, (this.heard.get(task) ?? 0) + 1)
      if (task.name === 'cleanup') this.cleanupsHeard++
      return answerHostile(random, error)
    }
    await this.instance.register(backgroundTasks, { ...this.options, onError, tasks: [...Object.values(others), ...this.hasFirst ? [first] : []] })
  }

  /** The counts add up at any time. */
  sample (): void {
    const { pending, running, succeeded, failed, skipped, abandoned, enqueued, oldestPendingMs } = this.instance.backgroundTasks.stats
    if (pending < 0 || running < 0 || oldestPendingMs < 0) this.problems.add('a count is negative')
    if (running < this.running) this.problems.add(`running is ${running}, and ${this.running} tasks run`)
    const total = pending + running + succeeded + failed + skipped + abandoned + enqueued
    if (total !== this.accepted) this.problems.add(`the counts add up to ${total}, not ${this.accepted}`)
    if (this.running > (this.options.concurrency ?? Infinity)) this.problems.add(`${this.running} lists run at once`)
  }
}

function answerHostile (random: Random, error: unknown): Promise<void> | undefined {
  const answer = random(5)
  if (answer === 0) throw error
  if (answer === 1) return Promise.reject(error)
  if (answer === 2) return turns(1)
  return answer === 3 ? new Lazy(async () => { await turns(1) }) as unknown as Promise<void> : undefined
}

/** A task that was accepted, and what the model expects of it. */
export class Planned {
  task!: BackgroundTask
  forFailure: boolean | 'perhaps' = false
  condition: typeof CONDITIONS[number]
  job: typeof JOBS[number] | undefined
  key: string | undefined
  isDelayed = false
  cancelled = false
  /** Whether it came behind the close. */
  wasRefused = false
  starts = 0
  hasFailed = false
  /** By its `when`. */
  lastWords = 0
  readonly thenables: Lazy[] = []
  /** Attempts that fail. */
  readonly failures: number
  readonly retryAnswer: 'yes' | 'no' | 'throws' | 'promise'
  readonly id: string
  readonly program: Program
  readonly kind: typeof KINDS[number]
  readonly random: Random
  #error: unknown

  constructor (program: Program, id: string, kind: typeof KINDS[number], random: Random) {
    this.program = program
    this.id = id
    this.kind = kind
    this.random = random
    this.condition = kind === 'of the app' ? undefined : pick(CONDITIONS, random)
    if (kind === 'job') this.job = pick(JOBS, random)
    this.failures = random(5)
    this.retryAnswer = pick(['yes', 'no', 'throws', 'promise'], random)
  }

  /** Starts that it has if nobody stops it. */
  get attempts (): number {
    if (this.job === undefined) return 1
    const most = this.job === 'picky' && this.retryAnswer !== 'yes' ? 1 : definitions[this.job].retry.attempts
    return Math.min(this.failures + 1, most)
  }

  get fails (): boolean {
    return this.job === undefined ? FAILING_KINDS.has(this.kind) : this.failures >= this.attempts
  }

  /** The function of the task, or one attempt of a job. */
  run (kind: string): unknown {
    const { program, random } = this
    program.started(this)
    const end = (): void => { program.ended(this) }
    const async = async (): Promise<unknown> => {
      try {
        await turns(random(3))
        if (kind === 'async nest') program.addSome(`async task ${this.id}`)
        if (FAILING_KINDS.has(kind)) throw this.#newError()
        return 1
      } finally {
        end()
      }
    }
    const thenable = (then?: (resolve: () => void) => void): unknown => {
      const lazy = new Lazy(async)
      this.thenables.push(lazy)
      if (then !== undefined) lazy.then = (resolve: unknown) => { lazy.calls++; end(); then(resolve as () => void); throw this.#newError() }
      return lazy
    }
    switch (kind) {
      case 'lazy': case 'failing lazy': return thenable()
      case 'then throws': return thenable(() => {})
      case 'then settles twice': return thenable(resolve => { resolve(); resolve() })
      case 'async': case 'reject': case 'async nest': case 'realm': case 'failing realm': return async()
      case 'nest': program.addSome(`task ${this.id}`); break
      case 'cancels': program.cancelOne(random); program.refuseOne(random); break
      case 'cleans up': program.addCleanup(random); break
    }
    end()
    if (kind === 'then cannot be read') return { get then () { return hostile() } }
    if (kind === 'revoked') return revoked()
    if (kind === 'odd') return pick([Object.create(null), { then: 1 }, 1n, { toJSON: hostile }, () => {}], random)
    if (FAILING_KINDS.has(kind)) throw this.#newError()
    return this
  }

  attempt (context: TaskContext): unknown {
    const { instance } = this.program.unit
    if (context.app !== instance || context.attempt !== this.starts + 1 || context.id !== this.task.id) this.program.problem(`a job's context is of ${context.attempt}`)
    const fails = this.starts < this.failures
    return this.run(pick(fails ? ['throw', 'reject', 'failing lazy', 'then throws'] : ['sync', 'async', 'lazy', 'nest', 'odd'], this.random))
  }

  answerRetry (): boolean {
    if (this.retryAnswer === 'throws') hostile()
    if (this.retryAnswer === 'promise') return Promise.reject(new Error('retry.when')) as unknown as boolean
    return this.retryAnswer === 'yes'
  }

  hearLast (error: unknown): Promise<void> {
    this.lastWords++
    if (error !== this.#error && this.retryAnswer !== 'promise') this.program.problem('onFailed is given another error')
    return answerHostile(this.random, error) as Promise<void>
  }

  answerWhen (outcome: ExchangeOutcome): boolean {
    const { list, unit } = this.program
    if (outcome !== list.outcome) this.program.problem('`when` is given another outcome')
    unit.sample()
    if (this.condition === 'cancels' || this.condition === 'cancels and throws') this.cancelled = this.task.cancel() || this.cancelled
    if (this.condition === 'throws' || this.condition === 'cancels and throws') {
      if (this.condition === 'throws') this.#failNow()
      throw this.#newError()
    }
    if (this.condition === 'promise') {
      this.#failNow()
      return Promise.reject(new Error('when')) as unknown as boolean
    }
    return this.condition !== 'no'
  }

  /** States that it may have ended in. */
  allowed (outcome: ExchangeOutcome | undefined): string[] {
    const { stopOnError = false, when: default_ } = this.program.unit.options
    if (this.cancelled) return ['skipped']
    const end = this.fails ? 'failed' : 'succeeded'
    const others = [...this.key === undefined ? [] : ['skipped'], ...stopOnError && this.kind !== 'of the app' ? ['skipped'] : []]
    if (this.kind === 'of the app') return [end]
    if (this.condition === 'throws' || this.condition === 'promise') return ['failed', ...others]
    const isWanted = (forFailure: boolean): boolean => {
      const when = this.condition ?? (this.job === 'always' ? 'always' : default_ === undefined && forFailure ? 'always' : default_ ?? 'success')
      return when === 'success' ? outcome?.failed === false : when === 'error' ? outcome?.failed === true : when !== 'no'
    }
    const wanted = this.forFailure === 'perhaps' ? [true, false].map(isWanted) : [isWanted(this.forFailure)]
    return [...wanted.map(is => is ? end : 'skipped'), ...wanted.includes(true) ? others : []]
  }

  #failNow (): void {
    this.hasFailed = true
    this.program.stopped = true
  }

  #newError (): unknown {
    this.#error = this.job === 'picky' ? Object.assign(new Error('picky'), { planned: this }) : pick(errors, this.random)()
    return this.#error
  }
}

/** One request: what it adds, how it ends, and what has happened. */
export class Program {
  readonly unit: Unit
  readonly seed: number
  readonly ending: typeof ENDINGS[number]
  readonly method: string
  readonly leavesAt: string | undefined
  readonly waits: boolean
  readonly isGated: boolean
  readonly hasReadableLog: boolean
  readonly planned: Planned[] = []
  readonly entered = deferred()
  readonly work: Array<Promise<unknown>> = []
  request!: FastifyRequest
  reply!: FastifyReply
  visitor!: Visitor
  hasLeft = false
  hasBegun = false
  thrown: unknown
  rows: Lazy | undefined
  /** What the model has seen: a failure is being handled, the handler's side is done, a task has failed for good. */
  handling: boolean | 'perhaps' = false
  settled = false
  stopped = false
  #gone: Promise<unknown> = Promise.resolve()
  #running = 0
  #ran: Planned[] = []
  #cleanups: object[] = []
  #open = 0
  #touched = false
  path = ''
  #onSendFails: boolean
  readonly #problems = new Set<string>()

  constructor (unit: Unit, seed: number, isGated: boolean) {
    const random = forkOf(seed, 'program')
    this.unit = unit
    this.seed = seed
    this.isGated = isGated
    const ending = this.ending = pick(ENDINGS, random)
    this.method = pick(['GET', 'GET', 'POST'], random)
    this.waits = random(2) === 0
    this.hasReadableLog = random(4) > 0
    const isRaw = ending === 'raw in a hook' || ending === 'raw'
    this.leavesAt = ending === 'endless stream' || ending === 'events'
      ? 'data'
      : random(2) === 0 ? undefined : pick(isRaw ? ['headers'] : [...SERVER_POINTS, 'headers', 'data'], random)
    this.#onSendFails = ending === 'onSend fails'
  }

  get list (): BackgroundTasks {
    this.#touched = true
    return this.request.backgroundTasks
  }

  /** A body of which only a part is sent: the client leaves before the rest. */
  get isCut (): boolean {
    return this.method === 'POST' && this.leavesAt === 'onRequest'
  }

  get words (): string {
    const { method, ending, leavesAt, waits, unit: { instance, options } } = this
    const protocol = instance.initialConfig.http2 === true ? 'HTTP/2' : 'HTTP/1.1'
    return `${protocol} ${method} "${ending}" ${this.path} ${JSON.stringify(options)}, the client ${leavesAt === undefined ? 'stays' : `leaves at ${leavesAt}${waits ? ', and the server sees it first' : ''}`}`
  }

  send ({ send }: Visitors, prefix: string): void {
    const { ending, seed, method, leavesAt, isCut } = this
    this.path = `${prefix}/${ending === 'not found' ? 'not/found/' : ending === 'invalid' ? 'valid/' : ''}${seed}${ending === 'invalid' ? '?n=x' : ''}`
    this.visitor = send({ path: this.path, method, body: method === 'POST' ? 'body' : undefined, leavesAt, isCut, isAlone: this.fork('client')(2) === 0 })
  }

  track (work: Promise<unknown>): Promise<unknown> {
    this.work.push(work)
    return work
  }

  problem (what: string): void {
    this.#problems.add(what)
  }

  fork (place: string): Random {
    return forkOf(this.seed, place)
  }

  begin (request: FastifyRequest, reply: FastifyReply): void {
    this.hasBegun = true
    this.request = request
    this.reply = reply
    this.#gone = once(reply.raw, 'close')
    if (!this.hasReadableLog) request.log = unreadableLogger()
    this.entered.resolve()
    for (let late = this.fork('late')(3); late > 0; late--) this.work.push(turns(4 * late).then(() => { this.addSome(`late ${late}`) }))
  }

  /** The client leaves here, if it does, and the server may see it first. */
  async at (point: string): Promise<void> {
    if (this.leavesAt !== point || this.hasLeft) return
    this.hasLeft = true
    this.visitor.leave()
    if (this.waits) await this.#gone
  }

  async fail (): Promise<never> {
    const error = pick(thrown, this.fork('thrown'))()
    // Of a hook that rejects with nothing Fastify makes an error of its own.
    this.thrown = error === undefined && this.ending !== 'throw' ? new Error('hook') : error
    throw this.thrown
  }

  handle (): unknown {
    const { reply, ending } = this
    this.addSome('handler')
    const later = async (): Promise<void> => {
      await this.at('handler')
      await turns(this.fork('turns')(4))
      this.addSome('later in the handler')
    }
    const then = (fn: () => unknown): Promise<unknown> => this.track(later()).then(fn)
    switch (ending) {
      case 'sync': void reply.send('sync'); return undefined
      case 'sync throw': this.thrown = new Error('sync'); throw this.thrown
      case 'callback': void then(() => reply.send('callback')); return undefined
      case 'callback error': void then(() => reply.send(this.thrown = new Error('callback'))); return undefined
      case 'returned reply': {
        void then(() => reply.send('reply'))
        // What it does behind an abort is late.
        this.settled = true
        return reply
      }
      case 'raw': this.#endRaw(); return undefined
      case 'lazy': this.rows = new Lazy(() => then(() => 'rows')); return this.rows
      case 'hijack': reply.hijack(); this.settled = true; void then(() => reply.raw.end('hijacked')); return undefined
      case 'async hijack': return then(() => { reply.hijack().raw.end('hijacked'); this.settled = true })
      case 'undefined': return then(() => { this.settled = true })
      case 'status': return then(() => reply.code(404).send('by hand'))
      case 'throw': return then(() => this.fail())
      case 'send error': return then(() => reply.send(this.thrown = new Error('sent')))
      case 'stream': return then(() => Readable.from(['a', 'b']))
      case 'web stream': return then(() => new Response('web'))
      case 'broken stream': return then(() => Readable.from((async function * () { yield 'a'; await turns(2); throw new Error('stream') })()))
      case 'endless stream': return then(() => new Readable({ read () { this.push('x'.repeat(1_000)) } }))
      case 'events': return then(async () => {
        reply.raw.write('data: 1\n\n')
        await this.#gone
        this.settled = true
      })
      default: return then(() => 'async')
    }
  }

  readonly hooks = {
    onRequest: async (): Promise<void> => {
      this.addSome('onRequest')
      // A list that is opened behind the loss of a body may have no sign for 10 s.
      if (this.isCut) this.addCleanup(this.fork('cut'))
      await this.at('onRequest')
      if (this.ending === 'onRequest fails') await this.fail()
    },
    preHandler: async (): Promise<void> => {
      this.addSome('preHandler')
      await this.at('preHandler')
      if (this.ending === 'preHandler fails') await this.fail()
    },
    onError: async (error: { code?: unknown } | undefined): Promise<void> => {
      this.handling = /PREMATURE_CLOSE|HEADERS_SENT/.test(String(error?.code)) ? 'perhaps' : true
      this.addSome('onError')
      await turns(this.fork('onError turns')(2))
      this.addSome('later in onError')
    },
    onSend: async (): Promise<void> => {
      this.handling = false
      this.addSome('onSend')
      await this.at('onSend')
      await turns(this.fork('onSend turns')(2))
      this.settled = true
      if (!this.#onSendFails) return
      this.#onSendFails = false
      await this.fail()
    },
    onResponse: async (): Promise<void> => {
      this.addSome('onResponse')
      if (this.fork('onResponse fails')(4) === 0) throw new Error('onResponse')
    },
    onRequestAbort: async (): Promise<void> => { this.addSome('onRequestAbort') }
  }

  rawInHook (done: () => void): void {
    if (this.ending === 'raw in a hook') this.#endRaw()
    else done()
  }

  #endRaw (): void {
    this.reply.raw.end('raw')
    this.settled = true
  }

  handleError (): unknown {
    const random = this.fork('error handler')
    const kind = random(4)
    this.addSome('error handler')
    if (kind === 0) throw new Error('error handler')
    if (kind === 1) return this.reply.code(200).send('handled')
    return turns(random(3)).then(() => {
      this.addSome('later in the error handler')
      return 'handled'
    })
  }

  addSome (place: string): void {
    const random = this.fork(place)
    const depth = this.#open++
    // Tasks of tasks get fewer, so that it ends.
    for (let i = random(depth > 12 ? 1 : 3); i > 0; i--) this.#add(this.fork(`${place}/${i}`), `${place}/${i}`)
    if (random(5) === 0) this.addCleanup(random)
    if (random(4) === 0) this.refuseOne(random)
    if (random(4) === 0) this.cancelOne(random)
    this.unit.sample()
  }

  #add (random: Random, place: string): void {
    const { unit, list } = this
    // A place may be reached twice, as `onSend` is behind an error.
    const planned = new Planned(this, `${this.seed}/${this.planned.length} ${place}`, pick(KINDS, random), random)
    const { condition, kind, job } = planned
    planned.forFailure = kind === 'of the app' ? false : this.handling
    all.set(planned.id, planned)
    const when = condition === undefined || condition === 'success' || condition === 'error' || condition === 'always'
      ? condition
      : (outcome: ExchangeOutcome): boolean => planned.answerWhen(outcome)
    const adder: TaskAdder = kind === 'of the app' ? unit.instance.backgroundTasks : when === undefined ? list : list.with({ when, ...random(4) === 0 && { timeout: 60_000 } })
    const body = (given: Planned): unknown => {
      if (given !== planned) this.problem('another argument')
      return planned.run(kind)
    }
    if (job !== undefined) {
      // A key is of one app, or of one request; a task that is tried again does not hold it alone while it waits.
      if (random(3) === 0 && condition === undefined) planned.key = random(2) === 0 ? `key ${random(4)}` : `${this.seed} ${random(2)}`
      planned.isDelayed = random(6) === 0
    }
    planned.task = storage.run(planned, () => {
      if (job !== undefined) return adder.addTask(definitions[job], { id: planned.id }, { key: planned.key, delay: planned.isDelayed ? 1 : undefined })
      if (kind === 'realm' || kind === 'failing realm') return adder.addTask(inRealm as (...args: unknown[]) => unknown, body, planned)
      if (kind === 'nameless') return adder.addTask(Object.defineProperty(body, 'name', { get: hostile }), planned)
      if (kind === 'proxy') return adder.addTask(new Proxy(body, { get: (_, key) => key === 'name' ? hostile() : Reflect.get(body, key) }), planned)
      return kind === 'made elsewhere' ? adder.addTask(new BackgroundTask(body, planned)) : adder.addTask(body, planned)
    })
    unit.accepted++
    planned.wasRefused = planned.task.state === 'abandoned' && this.isGated
    if (!planned.wasRefused && planned.task.state !== 'pending') this.problem(`added in state ${planned.task.state}`)
    this.planned.push(planned)
    unit.planned.push(planned)
    if (random(12) === 0) this.#cancel(planned)
  }

  cancelOne (random: Random): void {
    const victims = this.planned.filter(({ key }) => key === undefined)
    if (victims.length > 0) this.#cancel(pick(victims, random))
  }

  #cancel (victim: Planned): void {
    const isPending = victim.task.state === 'pending'
    if (victim.task.cancel() !== isPending) this.problem(`cancel() of a task that is ${isPending ? '' : 'not '}pending`)
    victim.cancelled ||= isPending
  }

  /** What is refused throws, and changes nothing. */
  refuseOne (random: Random): void {
    const { list, unit, planned } = this
    const cancelled = new BackgroundTask(() => {})
    cancelled.cancel()
    const cases: Array<[string, () => unknown]> = [
      ['FST_BGT_INVALID_TASK', () => list.addTask(function * () { yield 1 })],
      ['FST_BGT_INVALID_TASK', () => list.addTask(async function * () { yield 1 })],
      ['FST_BGT_INVALID_TASK', () => list.addTask(function * () { yield 1 })],
      ['FST_BGT_INVALID_TASK', () => list.addCleanup(function * () { yield 1 })],
      ['FST_BGT_INVALID_TASK', () => list.addTask(cancelled as never)],
      ['FST_BGT_INVALID_TASK', () => list.addTask(Promise.resolve() as never)],
      ['FST_BGT_INVALID_PAYLOAD', () => list.addTask(definitions.once, {} as never)],
      ['FST_BGT_INVALID_PAYLOAD', () => list.addTask(definitions.once, { id: 1n } as never)],
      ['FST_BGT_INVALID_OPTION', () => list.with({ name: 'x' }).addTask(definitions.once, { id: 'x' })],
      ['FST_BGT_INVALID_OPTION', () => list.with({ when: 'never' as 'always' })]
    ]
    if (planned.length > 0) cases.push(['FST_BGT_INVALID_TASK', () => list.addTask(pick(planned, random).task as never)])
    if (!unit.hasFirst) cases.push(['FST_BGT_UNKNOWN_TASK', () => list.addTask(definitions.first)])
    const [code, add] = pick(cases, random)
    try {
      add()
      this.problem(`not refused: ${String(add)}`)
    } catch (error) {
      if ((error as { code?: string }).code !== code) this.problem(`${String(add)} throws ${String(error)}`)
    }
    unit.sample()
  }

  addCleanup (random: Random): void {
    const kind = this.#open++ > 12 ? 0 : random(7)
    const id = `cleanup ${this.#open}`
    const cleanup = (): unknown => {
      if (this.#cleanups.pop() !== cleanup) this.problem('a cleanup runs twice, or out of order')
      if (this.#running > 0 || this.#own.some(({ task }) => task.state === 'pending' || task.state === 'running')) this.problem('a cleanup runs before the last task')
      this.unit.sample()
      if (kind === 1) return turns(2)
      if (kind === 2) return new Lazy(async () => { await turns(1) })
      if (kind === 3) this.addCleanup(random)
      if (kind === 4) this.addSome(id)
      if (kind < 5) return undefined
      this.unit.cleanupsFailed++
      if (kind === 5) return turns(1).then(hostile)
      throw pick(errors, random)()
    }
    this.#cleanups.push(cleanup)
    Object.defineProperty(cleanup, 'name', { value: 'cleanup' })
    this.list.addCleanup(cleanup)
  }

  get #own (): Planned[] {
    return this.planned.filter(({ kind }) => kind !== 'of the app')
  }

  get #isOver (): boolean {
    const raw = this.reply.raw as FastifyReply['raw'] & { stream?: { aborted: boolean, closed: boolean, destroyed: boolean } }
    const { stream } = raw
    return raw.writableFinished || raw.destroyed || raw.closed || (stream !== undefined && (stream.aborted || stream.closed || stream.destroyed))
  }

  started (planned: Planned): void {
    const { unit } = this
    if (planned.starts++ === 0 && !planned.isDelayed && planned.kind !== 'of the app') this.#ran.push(planned)
    unit.running++
    if (planned.task.state !== 'running') this.problem(`runs in state ${planned.task.state}`)
    if (storage.getStore() !== planned) this.problem('runs in another context')
    unit.sample()
    if (planned.kind === 'of the app') return
    if (this.#running++ > 0) this.problem('two at once')
    // A body that is cut off may keep Fastify from calling the handler; on not-found routes the plugin's `onSend` hook is not the last one.
    const isSettled = this.settled || this.isCut || this.ending === 'not found'
    if (this.list.outcome === undefined || !isSettled || !this.#isOver) this.problem(`started before ${this.list.outcome === undefined ? 'there was an outcome' : isSettled ? 'the response was over' : 'the handler and the onSend hooks had ended'}`)
    if (this.stopped && unit.options.stopOnError === true) this.problem('started behind a failure')
  }

  ended (planned: Planned): void {
    this.unit.running--
    this.unit.sample()
    if (planned.kind === 'of the app') return
    this.#running--
    if (planned.fails && planned.starts === planned.attempts) this.stopped = true
  }

  /** What has happened against the model. */
  async check (): Promise<string[]> {
    const status = await this.visitor.ended
    if (!this.hasBegun) return ['it has not begun']
    if (this.#touched) this.#checkOutcome(status)
    if (this.rows !== undefined && this.rows.calls !== 1) this.problem(`\`then\` of the answer was called ${this.rows.calls} times`)
    for (const planned of this.planned) this.#checkTask(planned)
    const order = this.#ran.map(planned => this.planned.indexOf(planned))
    if (order.some((place, i) => i > 0 && place < (order[i - 1] as number))) this.problem(`out of order: ${order.join()}`)
    if (this.#cleanups.length > 0) this.problem(`${this.#cleanups.length} cleanups have not run`)
    if (this.#touched && this.list.length !== 0) this.problem(`length is ${this.list.length}`)
    return [...this.#problems]
  }

  #checkOutcome (status: number | undefined): void {
    const { ending, leavesAt, hasLeft, waits, list: { outcome } } = this
    if (outcome === undefined) {
      this.problem('the exchange has not ended')
      return
    }
    const leavesBySelf = leavesAt === 'headers' || leavesAt === 'data'
    const isBroken = ending === 'broken stream'
    const isEndless = ending === 'endless stream' || ending === 'events'
    const aborted = isEndless || (isBroken && !hasLeft) || (hasLeft && waits) ? true : hasLeft || leavesBySelf ? undefined : false
    if (aborted !== undefined && outcome.aborted !== aborted) this.problem(`aborted is ${String(outcome.aborted)}, and the client got ${String(status)}`)
    // Whether Fastify calls a handler whose body was cut off, and whether a stream or the client was first, is not ours to say.
    const isOpen = this.isCut || (isBroken && (hasLeft || leavesBySelf))
    const failed = (FAILING as readonly string[]).includes(ending)
    if (!isOpen && outcome.failed !== failed) this.problem(`failed is ${String(outcome.failed)}`)
    if (!isOpen && failed && ending !== 'invalid' && outcome.error !== this.thrown) this.problem('the outcome has another error')
    if (aborted === false && (status !== outcome.statusCode)) this.problem(`the status is ${outcome.statusCode}, and the client got ${String(status)}`)
  }

  #checkTask (planned: Planned): void {
    const { task, kind, job, starts, attempts, cancelled, key, wasRefused } = planned
    const { unit } = this
    const { state } = task
    const what = `${[job ?? kind, planned.condition ?? 'default', key === undefined ? '' : 'keyed', planned.forFailure === false ? '' : 'for failure', cancelled ? 'cancelled' : ''].filter(Boolean).join(', ')} (${planned.id})`
    const allowed = wasRefused ? ['abandoned'] : planned.allowed(this.#touched ? this.list.outcome : undefined)
    if (!allowed.includes(state)) this.problem(`${what}: ${state}, not ${allowed.join(' or ')}`)
    if (state === 'skipped' && allowed[0] !== 'skipped' && key === undefined && !this.stopped) this.problem(`${what}: skipped, and nothing has failed`)
    const hasRun = (state === 'succeeded' || state === 'failed') && !(state === 'failed' && planned.hasFailed)
    if (hasRun ? starts !== attempts : starts > (state === 'skipped' && job !== undefined ? attempts : 0)) this.problem(`${what}: ${state}, started ${starts} times`)
    for (const { calls } of planned.thenables) if (calls !== 1) this.problem(`${what}: \`then\` was called ${calls} times`)
    const failures = state === 'failed' ? 1 : 0
    if ((unit.heard.get(task) ?? 0) !== failures) this.problem(`${what}: onError heard ${unit.heard.get(task) ?? 0} times of it`)
    if (planned.lastWords !== (job !== undefined && starts > 0 ? failures : 0)) this.problem(`${what}: onFailed was called ${planned.lastWords} times`)
    const isLogged = this.hasReadableLog && key === undefined
    if (isLogged && (unit.lines.get(task.id) ?? 0) !== failures) this.problem(`${what}: ${unit.lines.get(task.id) ?? 0} lines of its failure`)
  }
}
