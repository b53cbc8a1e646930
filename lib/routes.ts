/**
 * The operator's routes, `fastify-background-tasks/routes`: what waits, what has failed and why, start it again, cancel it, is all well.
 *
 * Whoever reaches them can see and stop the work of everybody, so `register` refuses without a guard.
 *
 * @module routes
 */
import { STATUS_CODES } from 'node:http'
import type { FastifyInstance, FastifyReply, FastifyRequest, RouteShorthandOptions } from 'fastify'
import fp from 'fastify-plugin'
import { AppBackgroundTasks, type FoundRecord } from './decorators/app-background-tasks.js'
import { get } from './decorators/enqueue.js'
import { JOB_STATES, MAX_LIMIT } from './decorators/operating.js'
import type { AnyTaskDefinition } from './definitions/define-task.js'
import type { JobState } from './engines/engine.js'
import {
  FST_BGT_CLOSED, FST_BGT_ENGINE_UNAVAILABLE, FST_BGT_INVALID_OPTION, FST_BGT_OVERLOADED, FST_BGT_UNSUPPORTED, PACKAGE, RETRY_AFTER
} from './errors.js'
import { attempt, isInstance } from './foreign.js'
import { OPTIONS_OF_OTHERS } from './options.js'
import { schemasOf } from './routes/schemas.js'
import { withoutHosts } from './routes/without-hosts.js'
import { BOOLEAN, check, FUNCTION, type Rule, type Rules } from './rules.js'

/** Options of `app.register(taskRoutes, options)`, beside those of Fastify, such as `prefix`. One of `onRequest`, `preHandler` and `public` is required. */
export interface TaskRoutesOptions {
  /**
   * The guard: a hook, or several, that answers or throws if the client may not operate tasks. It is called for these routes only. Guards of
   * the app are called too, and do not count as this one.
   * @default none
   */
  readonly onRequest?: RouteShorthandOptions['onRequest'] | undefined
  /**
   * A guard that runs later than `onRequest`, when the body has been read.
   * @default none
   */
  readonly preHandler?: RouteShorthandOptions['preHandler'] | undefined
  /**
   * With `true` the routes need no guard of their own, for example because the server listens only in a private network.
   * @default false
   */
  readonly public?: boolean | undefined
  /**
   * Whether records carry their payloads, which may hold what not every operator may see.
   * @default false
   */
  readonly payloads?: boolean | undefined
}

const HOOK: Rule = { accepts: 'a function, or an array of functions', test: value => (Array.isArray(value) ? Array.from<unknown>(value) : [value]).every(FUNCTION.test) }
const RULES: Rules = { onRequest: HOOK, preHandler: HOOK, public: BOOLEAN, payloads: BOOLEAN }

/** What a route answers, unless all is well with 200. */
class Answer {
  readonly status: number
  readonly body: unknown

  constructor (status: number, body: unknown) {
    this.status = status
    this.body = body
  }

  static failure (status: number, message: string, code?: string): Answer {
    return new Answer(status, { statusCode: status, ...code !== undefined && { code }, error: STATUS_CODES[status], message })
  }
}

async function routes (app: FastifyInstance, options: TaskRoutesOptions): Promise<void> {
  check('taskRoutes', options, RULES, OPTIONS_OF_OTHERS)
  const guards = { ...guard('onRequest', options.onRequest), ...guard('preHandler', options.preHandler) }
  if (Object.keys(guards).length === 0 && options.public !== true) {
    throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: taskRoutes needs a guard, because its routes show and stop the work of everybody: pass a function as the option "onRequest" or "preHandler", for example onRequest: app.basicAuth. A guard of the app does not count. If everybody may use the routes, pass public: true`)
  }
  const tasks = tasksOf(app)
  const intake = AppBackgroundTasks.intakeOf(tasks)
  const definitions = new Map(intake.jobs.definitions.map(definition => [definition.name, definition]))
  if (definitions.has('health')) {
    throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: taskRoutes has a route for the health of the engine where the tasks of the definition "health" would be: rename the definition`)
  }
  const withPayloads = options.payloads === true
  const schemas = schemasOf(withPayloads)
  /** What all routes have in common. The compilers are their own, because those of the app may understand another kind of schema. */
  const shared = { ...guards, validatorCompiler: () => () => true, serializerCompiler: () => toJson }

  app.get('/', { ...shared, schema: schemas.counts }, answering(async () =>
    await Promise.all(Array.from(definitions.values(), async definition => ({ name: definition.name, ...await tasks.count(definition) })))))

  app.get('/health', { ...shared, schema: schemas.health }, answering(async () => {
    const { error, ...health } = tasks.health()
    return new Answer(health.connected ? 200 : 503, { ...health, ...error !== undefined && { error: withoutHosts(error) } })
  }))

  app.get('/:name', { ...shared, schema: schemas.page }, answering(async request => {
    const definition = named(request)
    const { records, next } = await tasks.find(definition, { ...pageOf(request.query), payload: withPayloads }).catch(refuseCursor)
    return { records: records.map(toBody), next }
  }))

  app.get('/:name/:id', { ...shared, schema: schemas.record }, answering(async request => {
    const record = await get(intake, named(request), idOf(request), withPayloads)
    if (record === undefined) throw noTask()
    return toBody(record)
  }))

  app.post('/:name/:id/retry', { ...shared, schema: schemas.retry }, answering(async request => await change(request, 'retry')))
  app.delete('/:name/:id', { ...shared, schema: schemas.cancel }, answering(async request => await change(request, 'cancel')))

  function named (request: FastifyRequest): AnyTaskDefinition {
    const definition = definitions.get((request.params as { name: string }).name)
    if (definition === undefined) throw Answer.failure(404, 'There is no definition of this name')
    return definition
  }

  async function change (request: FastifyRequest, method: 'retry' | 'cancel'): Promise<Answer> {
    const definition = named(request)
    const id = idOf(request)
    if (await tasks[method](definition, id)) return new Answer(202, { id, name: definition.name })
    const record = await tasks.get(definition, id).catch(nothingWhereUnsupported)
    if (record === undefined) throw noTask()
    throw Answer.failure(409, method === 'retry' ? `The task has not failed for good. Its state is "${record.state}"` : `The task has ended. Its state is "${record.state}"`)
  }

  /** A record as it is answered, with nothing that a record of an engine of somebody else may hold beside. */
  function toBody ({ id, name, state, attempt, enqueuedAt, startedAt, finishedAt, error, result, payload }: FoundRecord): object {
    const reason = error && { name: error.name, message: error.message, code: error.code }
    return { id, name, state, attempt, enqueuedAt, startedAt, finishedAt, error: reason, result, ...withPayloads && { payload } }
  }
}

/** @throws FST_BGT_INVALID_OPTION */
function tasksOf (app: FastifyInstance): AppBackgroundTasks {
  if (!app.hasDecorator('backgroundTasks')) {
    throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: taskRoutes was registered in an app that has no background tasks: register ${PACKAGE} before it, in this app or a parent of it`)
  }
  const { backgroundTasks } = app
  if (isInstance(backgroundTasks, AppBackgroundTasks)) return backgroundTasks
  throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: taskRoutes was registered in an app whose app.backgroundTasks is of another copy of ${PACKAGE}: install it once`)
}

/** The hooks of an option. None if there is none, or an empty array of them. */
function guard (name: 'onRequest' | 'preHandler', hooks: unknown): Pick<RouteShorthandOptions, 'onRequest' | 'preHandler'> {
  if (hooks === undefined || (Array.isArray(hooks) && hooks.length === 0)) return {}
  return { [name]: Array.isArray(hooks) ? [...hooks as unknown[]] : hooks }
}

/** Makes a handler that answers by itself, whatever error handler and serializer the app has. */
function answering (act: (request: FastifyRequest) => Promise<unknown>): (request: FastifyRequest, reply: FastifyReply) => Promise<FastifyReply> {
  return async (request, reply) => {
    const answer = await act(request).catch(toAnswer(request))
    const { status, body } = isInstance(answer, Answer) ? answer : new Answer(200, answer)
    if (status === 503) reply.header('retry-after', RETRY_AFTER)
    return await reply.code(status).header('cache-control', 'no-store').type('application/json; charset=utf-8').serializer(toJson).send(body)
  }
}

/** What a client is told of an error. Reasons, which may name hosts, are only in the log. */
function toAnswer (request: FastifyRequest): (error: unknown) => Answer {
  return error => {
    if (isInstance(error, Answer)) return error
    if (isInstance(error, FST_BGT_UNSUPPORTED)) return Answer.failure(501, error.message, error.code)
    const isToBeRetried = isInstance(error, FST_BGT_ENGINE_UNAVAILABLE) || isInstance(error, FST_BGT_OVERLOADED) || isInstance(error, FST_BGT_CLOSED)
    attempt(() => { request.log[isToBeRetried ? 'warn' : 'error']({ err: error }, 'a route of background tasks has failed') })
    return isToBeRetried ? Answer.failure(503, error.message, error.code) : Answer.failure(500, 'Something went wrong')
  }
}

function noTask (): Answer {
  return Answer.failure(404, 'There is no such task, or its record is not kept any more')
}

/** The id of a request. No engine makes ids of control characters, and some servers take none of them. */
function idOf (request: FastifyRequest): string {
  const { id } = request.params as { id: string }
  if (/\p{Cc}|\uFFFD/u.test(id)) throw noTask()
  return id
}

/** Reads the query by itself, because validators of apps change values, or are none of JSON Schema. */
function pageOf (query: unknown): { readonly state: JobState, readonly limit?: number, readonly after?: string } {
  const { state, limit, after } = (query ?? {}) as Readonly<Record<string, unknown>>
  if (!JOB_STATES.includes(state as JobState)) throw Answer.failure(400, `The parameter "state" is required, and accepts one of ${JOB_STATES.join(', ')}`)
  const number = typeof limit === 'string' && /^\d{1,3}$/.test(limit) ? Number(limit) : limit
  if (number !== undefined && !(Number.isInteger(number) && (number as number) >= 1 && (number as number) <= MAX_LIMIT)) {
    throw Answer.failure(400, `The parameter "limit" accepts an integer from 1 to ${MAX_LIMIT}`)
  }
  if (after !== undefined && (typeof after !== 'string' || after === '')) throw badCursor()
  return { state: state as JobState, ...number !== undefined && { limit: number as number }, ...after !== undefined && { after } }
}

function badCursor (): Answer {
  return Answer.failure(400, 'The parameter "after" accepts the "next" of another page')
}

/** The other options of `find` were checked before. */
function refuseCursor (error: unknown): never {
  throw isInstance(error, FST_BGT_INVALID_OPTION) ? badCursor() : error
}

function nothingWhereUnsupported (error: unknown): undefined {
  if (!isInstance(error, FST_BGT_UNSUPPORTED)) throw error
}

/** An answer as JSON. Of an error, which a guard may have thrown, only what Fastify itself would show. */
function toJson (body: unknown): string {
  if (!isInstance(body, Error)) return JSON.stringify(body)
  const { statusCode, code, error, message } = body as Error & Readonly<Record<string, unknown>>
  return JSON.stringify({ statusCode, code, error, message })
}

/**
 * The routes of an app's background tasks: `await app.register(taskRoutes, { prefix: '/tasks', onRequest: app.basicAuth })`, after the plugin
 * itself. It may be registered several times.
 * @throws FST_BGT_INVALID_OPTION if there is no guard, if an option does not exist or has a wrong value, if the app has no background tasks,
 * and if a definition has the name `health`
 */
const taskRoutes = fp(routes, { fastify: '5.x', name: 'fastify-background-tasks-routes', encapsulate: true })

export default taskRoutes
export { taskRoutes }
