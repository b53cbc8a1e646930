import type { FastifyRequest } from 'fastify'
import type { AnyTaskDefinition } from './definitions/define-task.js'
import type { TaskContextOptions } from './definitions/travelling-context.js'
import type { ThreadPool } from './definitions/thread.js'
import type { EngineOptions } from './dispatch/connect-engine.js'
import type { TaskEngine } from './engines/engine.js'
import { FST_BGT_INVALID_OPTION, PACKAGE } from './errors.js'
import { methodOf } from './foreign.js'
import { BOOLEAN, check, COUNT, DELAY, DURATION, FUNCTION, LIMIT, OBJECT, type Rules } from './rules.js'
import type { RunnerOptions } from './runner/runner-options.js'
import type { BackgroundTask } from './tasks/background-task.js'
import { CONDITION, type TaskCondition } from './tasks/task-options.js'

/** Options of `app.register(backgroundTasks, options)`. A wrong value throws `FST_BGT_INVALID_OPTION` there. */
export interface FastifyBackgroundTasksOptions {
  /**
   * Which tasks of a request run. `with({ when })` decides for single tasks. The default does not skip a task that is added while a failure
   * is handled: in an `onError` hook, or in an error handler until its reply enters `onSend`. FastAPI does the same: it runs the task of
   * the response that an exception handler returns.
   * @default 'success'
   */
  readonly when?: TaskCondition | undefined

  /**
   * Whether a failed task skips the rest of its task list, as in FastAPI.
   * @default false
   */
  readonly stopOnError?: boolean | undefined

  /**
   * Called with each failure. The next task of the list waits for the promise that this returns. An error of this function is only logged.
   * `request` is `undefined` for tasks of the app, and for jobs that an engine has delivered.
   * @default none
   */
  readonly onError?: ((error: unknown, task: BackgroundTask, request: FastifyRequest | undefined) => void | Promise<void>) | undefined

  /**
   * Most task lists that run at the same time in this process. Minimum 1.
   * @default Infinity
   */
  readonly concurrency?: number | undefined

  /**
   * Most tasks that have not finished, over all task lists. At this limit `addTask` throws `FST_BGT_OVERLOADED` (503, `Retry-After`).
   * Jobs that an engine has delivered to this process do not count. Minimum 1.
   * @default Infinity
   */
  readonly maxPending?: number | undefined

  /**
   * Milliseconds for one task. When they have passed, the task is `failed` with `FST_BGT_TIMEOUT`, its signal aborts, and the task list
   * goes on. A synchronous task cannot be interrupted: it is `succeeded`, with a warning in the log. The list waits this long for the
   * promise of an `onError`, too, and this long for that of an `onFailed`: 30 s for each if there is no `timeout`.
   * @default none
   */
  readonly timeout?: number | undefined

  /**
   * Milliseconds after which a task that still runs is named in a warning, once. A synchronous task is named when it has returned.
   * @default none
   */
  readonly slowTask?: number | undefined

  /**
   * Milliseconds that a shutdown (`app.close()`) gives to the tasks that are left, counted from when the server has closed and the requests
   * in flight have ended. `0` abandons the tasks immediately. The default is below the 10 s that close-with-grace, Docker and Cloud Run
   * give to a process.
   * @default 8000
   */
  readonly closeTimeout?: number | undefined

  /**
   * The definitions that this app knows. `addTask` with another definition throws `FST_BGT_UNKNOWN_TASK`.
   * @default []
   */
  readonly tasks?: readonly AnyTaskDefinition[] | undefined

  /**
   * Where tasks of definitions are stored and run. Functions always run in this process.
   * @default none: tasks of definitions run in this process too
   */
  readonly engine?: TaskEngine<unknown> | undefined

  /**
   * Whether this process runs jobs of the engine, and how many jobs at the same time. A number counts for each definition. An object has
   * numbers by the name of the definition, with 10 for those that it does not name. `false` is for web processes beside separate workers.
   * `true` is `{ concurrency: 10 }`.
   * @default true
   */
  readonly worker?: boolean | { readonly concurrency?: number | Readonly<Record<string, number>> | undefined } | undefined

  /**
   * Milliseconds for storing the tasks of a request, or the task of one `enqueue`, connecting included. After that the client gets a 503,
   * `FST_BGT_ENGINE_UNAVAILABLE`. `app.ready()` waits no longer than this for the engine.
   * @default 2000
   */
  readonly enqueueTimeout?: number | undefined

  /**
   * With `'local'`, a task that cannot be stored runs in this process, with a warning in the log, and the client gets no 503.
   * @default none
   */
  readonly fallback?: 'local' | undefined

  /**
   * The platform's `waitUntil` (Vercel, Cloudflare, Lambda wrappers). The first `addTask` of a request calls it, in the context of that
   * call, with a promise that settles when the task list has ended and never rejects.
   * @default none
   */
  readonly waitUntil?: ((promise: Promise<void>) => void) | undefined

  /**
   * Whether `addTask` and `requestTasks` of `fastify-background-tasks/ambient` find the request that is being served. Costs an
   * `AsyncLocalStorage` for each request.
   * @default false
   */
  readonly ambient?: boolean | undefined

  /**
   * A value of the request that travels with its tasks of definitions, such as its tenant: `capture` takes it when a task is added, and
   * `restore` puts it back around each attempt. See `TaskContextOptions`.
   * @default none
   */
  readonly context?: TaskContextOptions | undefined

  /**
   * The pool of threads for definitions that have a `file`: an instance of `piscina`, or anything with its `run(task, { filename, signal })`.
   * You close it yourself, in an `onClose` hook: the tasks have ended by then.
   * @default none
   */
  readonly threads?: ThreadPool | undefined
}

/** The options with their defaults. */
export interface ResolvedOptions extends RunnerOptions, EngineOptions {
  readonly closeTimeout: number
  readonly tasks: readonly AnyTaskDefinition[]
  readonly engine: TaskEngine<unknown> | undefined
  readonly waitUntil: FastifyBackgroundTasksOptions['waitUntil']
  readonly ambient: boolean
  readonly threads: ThreadPool | undefined
  readonly context: TaskContextOptions | undefined
}

function isThreadPool (value: unknown): boolean {
  return OBJECT.test(value) && FUNCTION.test((value as { run?: unknown }).run)
}

function isEngine (value: unknown): boolean {
  return OBJECT.test(value) && OBJECT.test((value as { supports?: unknown }).supports) && ['start', 'enqueue', 'consume', 'pause', 'get', 'stop'].every(method => FUNCTION.test((value as Record<string, unknown>)[method]))
}

const PLUGIN_RULES: Rules = {
  when: CONDITION,
  stopOnError: BOOLEAN,
  onError: FUNCTION,
  concurrency: LIMIT,
  maxPending: LIMIT,
  timeout: DURATION,
  slowTask: DURATION,
  closeTimeout: DELAY,
  tasks: { accepts: 'an array of what defineTask returns', test: value => Array.isArray(value) },
  engine: { accepts: 'an engine, as bullmq(), pgBoss() or rabbitmq() make one', test: isEngine, isSecret: true },
  worker: { accepts: 'a boolean or { concurrency }', test: value => typeof value === 'boolean' || OBJECT.test(value) },
  enqueueTimeout: DURATION,
  fallback: { accepts: '\'local\'', test: value => value === 'local' },
  waitUntil: FUNCTION,
  ambient: BOOLEAN,
  context: { accepts: '{ capture, restore }', test: value => OBJECT.test(value) },
  threads: { accepts: 'a pool of threads with a method run(task, { filename, signal }), as new Piscina() makes one', test: isThreadPool, isSecret: true }
}

/**
 * Options that others hand to every plugin, and that are ignored here. Fastify hands on its options of `register`, and @fastify/autoload
 * hands on its own. fastify-cli gives an app its server options. An app that hands those on to @fastify/autoload gives them to all its
 * plugins.
 */
export const OPTIONS_OF_OTHERS: ReadonlySet<string> = new Set([
  'prefix', 'logLevel', 'logSerializers',
  'skipOverride', 'prefixOverride', 'autoPrefix', 'closeGraceDelay',
  'ajv', 'allowErrorHandlerOverride', 'allowUnsafeRegex', 'bodyLimit', 'caseSensitive', 'childLoggerFactory', 'clientErrorHandler',
  'connectionTimeout', 'constraints', 'disableRequestLogging', 'exposeHeadRoutes', 'forceCloseConnections', 'frameworkErrors', 'genReqId',
  'handlerTimeout', 'http', 'http2', 'http2SessionTimeout', 'https', 'ignoreDuplicateSlashes', 'ignoreTrailingSlash', 'jsonShorthand',
  'keepAliveTimeout', 'logController', 'logger', 'loggerInstance', 'maxParamLength', 'maxRequestsPerSocket', 'onConstructorPoisoning',
  'onProtoPoisoning', 'pluginTimeout', 'querystringParser', 'requestIdHeader', 'requestIdLogLabel', 'requestTimeout', 'return503OnClosing',
  'rewriteUrl', 'routerOptions', 'schemaController', 'schemaErrorFormatter', 'serializerOpts', 'serverFactory', 'trustProxy', 'useSemicolonDelimiter'
])

/** The methods of an engine that are there only if it supports what they do. */
const OPERATIONS = ['count', 'find', 'retry', 'cancel'] as const

function checkOperations (engine: TaskEngine<unknown>): void {
  const { name, supports } = engine
  const missing = OPERATIONS.find(method => supports[method] && !FUNCTION.test(engine[method]))
  if (missing !== undefined) throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: The engine "${name}" says that it supports "${missing}", and has no such method`)
}

/** @throws FST_BGT_INVALID_OPTION */
export function resolveOptions (options: FastifyBackgroundTasksOptions): ResolvedOptions {
  check('register', options, PLUGIN_RULES, OPTIONS_OF_OTHERS)
  const tasks = options.tasks ?? []
  if (options.engine !== undefined) checkOperations(options.engine)
  return {
    tasks,
    engine: options.engine,
    worker: resolveWorker(options.worker ?? true, tasks),
    enqueueTimeout: options.enqueueTimeout ?? 2000,
    fallback: options.fallback,
    when: typeof options.when === 'function' ? methodOf(options, options.when) : options.when,
    stopOnError: options.stopOnError ?? false,
    onError: options.onError && methodOf(options, options.onError),
    concurrency: options.concurrency ?? Infinity,
    maxPending: options.maxPending ?? Infinity,
    timeout: options.timeout,
    slowTask: options.slowTask,
    closeTimeout: options.closeTimeout ?? 8000,
    waitUntil: options.waitUntil && methodOf(options, options.waitUntil),
    ambient: options.ambient ?? false,
    threads: options.threads,
    context: options.context && resolveContext(options.context)
  }
}

function resolveContext (context: TaskContextOptions): TaskContextOptions {
  const { capture, restore } = context
  // An instance of a class may have fields of its own.
  check('context', isPlain(context) ? context : { capture, restore }, { capture: FUNCTION, restore: FUNCTION })
  const missing = capture === undefined ? 'capture' : restore === undefined ? 'restore' : undefined
  if (missing !== undefined) throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: The option "context" of register accepts { capture, restore }; "${missing}" is missing`)
  return { capture: methodOf(context, capture), restore: methodOf(context, restore) }
}

/** Whether an object is an instance of no class, in whatever realm. */
function isPlain (value: object): boolean {
  const prototype: unknown = Object.getPrototypeOf(value)
  return prototype === null || Object.getPrototypeOf(prototype) === null
}

const WORKER_RULES: Rules = {
  concurrency: { accepts: `${COUNT.accepts}, or an object of them by task name`, test: value => COUNT.test(value) || OBJECT.test(value) }
}

function resolveWorker (worker: NonNullable<FastifyBackgroundTasksOptions['worker']>, tasks: readonly AnyTaskDefinition[]): ResolvedOptions['worker'] {
  const defaultConcurrency = 10
  if (worker === false) return false
  if (worker === true) return { defaultConcurrency, concurrency: {} }
  check('worker', worker, WORKER_RULES)
  const { concurrency = defaultConcurrency } = worker
  if (typeof concurrency === 'number') return { defaultConcurrency: concurrency, concurrency: {} }
  check('concurrency of worker', concurrency, Object.fromEntries(tasks.map(({ name }) => [name, COUNT])))
  return { defaultConcurrency, concurrency: { ...concurrency } }
}
