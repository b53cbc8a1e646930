import type { FastifyRequest } from 'fastify'
import type { BackgroundTask } from './background-task.js'
import type { ExchangeOutcome } from './exchange.js'
import { FST_BGT_INVALID_OPTION, show } from './errors.js'

/**
 * Which tasks of an exchange run, decided when it has ended:
 * - `'success'`: unless the exchange failed, that is, an error was thrown or sent on the way. A status set by hand is no
 *   failure, nor is a client that hung up. FastAPI's rule.
 * - `'error'`: only if it failed.
 * - `'always'`.
 * - a function of the outcome. When it throws, the task is `failed` with that error.
 */
export type TaskCondition = 'success' | 'error' | 'always' | ((outcome: ExchangeOutcome) => boolean)

/** Options of `app.register(backgroundTasks, options)`. A wrong value throws `FST_BGT_INVALID_OPTION` there. */
export interface FastifyBackgroundTasksOptions {
  /**
   * Which tasks of an exchange run.
   * @default 'success'
   */
  readonly when?: TaskCondition | undefined

  /**
   * Whether a failed task skips the rest of its list, as in FastAPI.
   * @default false
   */
  readonly stopOnError?: boolean | undefined

  /**
   * Called with each failure; the next task of the list waits for its promise. Its own failure is logged, never thrown.
   * `request` is `undefined` for tasks of the app.
   */
  readonly onError?: ((error: unknown, task: BackgroundTask, request: FastifyRequest | undefined) => void | Promise<void>) | undefined

  /**
   * Task lists that run at once in this process. Minimum 1.
   * @default Infinity
   */
  readonly concurrency?: number | undefined

  /**
   * Tasks that have not finished, over all lists. At the limit `addTask` throws `FST_BGT_OVERLOADED` (503, `Retry-After`).
   * Minimum 1.
   * @default Infinity
   */
  readonly maxPending?: number | undefined

  /**
   * Milliseconds for one task. When they have passed the task is `failed` with `FST_BGT_TIMEOUT`, its signal aborts and
   * the list goes on. A synchronous task cannot be interrupted: it is `succeeded`, with a warning.
   * @default none
   */
  readonly timeout?: number | undefined

  /**
   * Milliseconds after which a task that still runs is named in a warning, once. A synchronous one is named when it has
   * returned.
   * @default none
   */
  readonly slowTask?: number | undefined

  /**
   * Milliseconds that `app.close()` gives the tasks that are left, from the moment the drain starts. `0` abandons them at
   * once. Below the 10 s of close-with-grace, Docker and Cloud Run.
   * @default 8000
   */
  readonly closeTimeout?: number | undefined

  /**
   * The platform's `waitUntil` (Vercel, Cloudflare, Lambda wrappers), called at the first `addTask` of a request, in its
   * context, with a promise that settles when the list has ended and never rejects.
   */
  readonly waitUntil?: ((promise: Promise<void>) => void) | undefined
}

/** Options of `with()`: for the tasks added through it only. */
export interface TaskOptions {
  /** Which outcomes the task runs for; not for tasks of the app, which have no exchange. */
  readonly when?: TaskCondition | undefined
  /** Milliseconds for the task. */
  readonly timeout?: number | undefined
  /** The task's name in log lines and messages, in place of the function's. */
  readonly name?: string | undefined
}

/** The options with their defaults. */
export interface ResolvedOptions {
  readonly when: TaskCondition
  readonly stopOnError: boolean
  readonly onError: FastifyBackgroundTasksOptions['onError']
  readonly concurrency: number
  readonly maxPending: number
  readonly timeout: number | undefined
  readonly slowTask: number | undefined
  readonly closeTimeout: number
  readonly waitUntil: FastifyBackgroundTasksOptions['waitUntil']
}

interface Rule {
  readonly accepts: string
  readonly holds: (value: unknown) => boolean
}

const isFunction = (value: unknown): boolean => typeof value === 'function'
const isBoolean = (value: unknown): boolean => typeof value === 'boolean'
const isLimit = (value: unknown): boolean => value === Infinity || (Number.isInteger(value) && (value as number) >= 1)
const isDuration = (value: unknown): boolean => isTimerDelay(value) && (value as number) > 0
const isCondition = (value: unknown): boolean =>
  value === 'success' || value === 'error' || value === 'always' || isFunction(value)

// Node's timers take at most a signed 32-bit number of milliseconds: past that they fire at once.
const MAX_DELAY = 2 ** 31 - 1
const isTimerDelay = (value: unknown): boolean => typeof value === 'number' && value >= 0 && value <= MAX_DELAY

const WHEN: Rule = { accepts: '\'success\', \'error\', \'always\' or a function of the outcome', holds: isCondition }
const LIMIT: Rule = { accepts: 'an integer of at least 1, or Infinity', holds: isLimit }
const DURATION: Rule = { accepts: `a number of milliseconds above 0 and at most ${MAX_DELAY}`, holds: isDuration }
const FUNCTION: Rule = { accepts: 'a function', holds: isFunction }

const PLUGIN_RULES: Readonly<Record<string, Rule>> = {
  when: WHEN,
  stopOnError: { accepts: 'a boolean', holds: isBoolean },
  onError: FUNCTION,
  concurrency: LIMIT,
  maxPending: LIMIT,
  timeout: DURATION,
  slowTask: DURATION,
  closeTimeout: { accepts: `a number of milliseconds from 0 to ${MAX_DELAY}`, holds: isTimerDelay },
  waitUntil: FUNCTION
}

const APP_TASK_RULES: Readonly<Record<string, Rule>> = {
  timeout: DURATION,
  name: { accepts: 'a string that is not empty', holds: value => typeof value === 'string' && value !== '' }
}

const REQUEST_TASK_RULES: Readonly<Record<string, Rule>> = { ...APP_TASK_RULES, when: WHEN }

const IDLE_RULES: Readonly<Record<string, Rule>> = { rejectOnFailure: { accepts: 'a boolean', holds: isBoolean } }

// Fastify hands its own options of `register` to the plugin too.
const REGISTER_OPTIONS = new Set(['prefix', 'logLevel', 'logSerializers'])

/** @throws FST_BGT_INVALID_OPTION */
export function resolveOptions (options: FastifyBackgroundTasksOptions): ResolvedOptions {
  check('register', options, PLUGIN_RULES, REGISTER_OPTIONS)
  return {
    when: options.when ?? 'success',
    stopOnError: options.stopOnError ?? false,
    onError: options.onError,
    concurrency: options.concurrency ?? Infinity,
    maxPending: options.maxPending ?? Infinity,
    timeout: options.timeout,
    slowTask: options.slowTask,
    closeTimeout: options.closeTimeout ?? 8000,
    waitUntil: options.waitUntil
  }
}

/** @throws FST_BGT_INVALID_OPTION */
export function checkTaskOptions (options: TaskOptions, ofApp: boolean): TaskOptions {
  check('with', options, ofApp ? APP_TASK_RULES : REQUEST_TASK_RULES)
  return options
}

/** @throws FST_BGT_INVALID_OPTION */
export function checkIdleOptions (options: IdleOptions): void {
  check('idle', options, IDLE_RULES)
}

/** Options of `app.backgroundTasks.idle()`. */
export interface IdleOptions {
  /**
   * Whether to reject with the failure of a task since the last `idle()` returned, or since the plugin was registered; with
   * an `AggregateError` of them when there are several (of the first 100).
   * @default false
   */
  readonly rejectOnFailure?: boolean | undefined
}

function check (where: string, options: object, rules: Readonly<Record<string, Rule>>, ignored?: ReadonlySet<string>): void {
  if (typeof options !== 'object' || options === null) {
    throw new FST_BGT_INVALID_OPTION(`${where} accepts an object of options; received ${show(options)}`)
  }
  for (const [name, value] of Object.entries(options)) {
    const rule = Object.hasOwn(rules, name) ? rules[name] : undefined
    if (rule === undefined) {
      if (ignored?.has(name) === true) continue
      throw new FST_BGT_INVALID_OPTION(`${where} has no option "${name}"; it accepts ${Object.keys(rules).join(', ')}`)
    }
    if (value !== undefined && !rule.holds(value)) {
      throw new FST_BGT_INVALID_OPTION(`The option "${name}" of ${where} accepts ${rule.accepts}; received ${show(value)}`)
    }
  }
}
