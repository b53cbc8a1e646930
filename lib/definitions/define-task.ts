import { isAbsolute } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import type { FastifyBaseLogger, FastifyInstance, FastifyTypeProvider } from 'fastify'
import { CONDITION, type TaskCondition } from '../tasks/task-options.js'
import { check, COUNT, DURATION, FUNCTION, NAME, OBJECT, SECONDS, DELAY, type Rule, type Rules } from '../rules.js'
import { FST_BGT_INVALID_OPTION, markOurs } from '../errors.js'
import { isThenable, methodOf, readOr } from '../foreign.js'
import { isStandardSchema, type InferInput, type InferOutput, type StandardSchema } from './standard-schema.js'

/** The second argument of a handler, after the payload. */
export interface TaskContext {
  /** The id of the task, the same in each attempt. */
  readonly id: string
  /** The number of this attempt, 1 for the first. An attempt counts whether its handler fails or its process dies. */
  readonly attempt: number
  /** Aborts at the attempt's timeout, with `FST_BGT_TIMEOUT` as reason, and at the deadline of a shutdown. */
  readonly signal: AbortSignal
  /** The request's logger if the task was added in this process. Otherwise the app's logger, with the request's id. */
  readonly log: FastifyBaseLogger
  /** The app that runs the task. */
  readonly app: FastifyInstance
  /** The headers `traceparent`, `tracestate` and `baggage` of the request, and those that a subscriber of the `enqueue` channel added. */
  readonly headers: Readonly<Record<string, string>>
  /** The id of the request that added the task. Undefined if no request did. */
  readonly requestId: string | undefined
}

/** The third argument of `onFailed`, after the payload and the error. */
export interface FailedTaskContext {
  /** The id of the task, the same as in its attempts. */
  readonly id: string
  /** The number of attempts that the task had. */
  readonly attempts: number
  /** The logger, the same as in its attempts. */
  readonly log: FastifyBaseLogger
  /** The app that ran the last attempt. */
  readonly app: FastifyInstance
}

/** Whether and when a failed attempt is followed by another one. */
export interface RetryPolicy {
  /**
   * Most attempts, those whose process died included.
   * @default 3
   */
  readonly attempts?: number | undefined
  /** The wait between a failure and the next attempt, in milliseconds: `delay`, or `delay * 2 ** (failures - 1)` up to `maxDelay`. */
  readonly backoff?: {
    /** Whether the wait doubles with each failure. @default 'exponential' */
    readonly type?: 'exponential' | 'fixed' | undefined
    /** Milliseconds before the second attempt. @default 1000 */
    readonly delay?: number | undefined
    /** The most milliseconds of any wait. @default 60000 */
    readonly maxDelay?: number | undefined
  } | undefined
  /**
   * Whether an error is worth another attempt. The answer has to be synchronous: a promise fails the task for good. @default every error is
   */
  readonly when?: ((error: unknown) => boolean) | undefined
}

/** What a task is, wherever it runs: the options of `declareTask`, beside the schema of the payload. */
export interface TaskDeclarationOptions {
  /** The name of the task, and of its queue in an engine: 1 to 128 letters, digits, `-`, `_` and `.`. */
  readonly name: string
  /** Milliseconds for one attempt. An attempt that takes longer has failed with `FST_BGT_TIMEOUT`. @default the plugin's `timeout` */
  readonly timeout?: number | undefined
  /** How often, and how soon, a failed attempt is followed by another. @default 3 attempts, with exponential backoff */
  readonly retry?: RetryPolicy | undefined
  /** The outcomes of a request for which the task runs. @default the plugin's `when` */
  readonly when?: TaskCondition | undefined
  /** Seconds for which the record of an ended task is kept. @default { succeeded: 3600, failed: 604800 } */
  readonly keep?: {
    /** Seconds for a task that has `succeeded`. @default 3600 */
    readonly succeeded?: number | undefined
    /** Seconds for a task that has `failed`. @default 604800 */
    readonly failed?: number | undefined
  } | undefined
}

/** What is done when a task has failed for good. */
export interface TaskFailureOptions<Payload> {
  /**
   * Called once, when the task has failed for good after an attempt. Not called for a payload that a worker found invalid. An error of this
   * function is only logged.
   */
  onFailed? (payload: Payload, error: unknown, context: FailedTaskContext): void | Promise<void>
}

/** The options of `defineTask`, beside the schema of the payload. */
export interface TaskDefinitionOptions<Payload, Result> extends TaskDeclarationOptions, TaskFailureOptions<Payload> {
  /** Runs one attempt. What this returns, as JSON, is the result of the task. */
  handler (payload: Payload, context: TaskContext): Result | Promise<Result>
}

/** The options of `defineTask` for CPU-bound work, beside the schema of the payload. */
export interface TaskFileOptions<Payload> extends TaskDeclarationOptions, TaskFailureOptions<Payload> {
  /**
   * A `file:` URL or an absolute path, in place of `handler`: a module whose default export is
   * `(payload, { id, attempt, headers, requestId }) => result`. It runs in a thread of the pool that the option `threads` of `register` is.
   */
  readonly file: URL | string
}

/** Options of `defineTask` and `declareTask`, as they are checked. */
interface AnyOptions extends TaskDeclarationOptions, TaskFailureOptions<never> {
  readonly payload?: unknown
  handler? (payload: never, context: TaskContext): unknown
  readonly file?: URL | string
}

/** The declarations of the definitions that were made of one. */
const declarations = new WeakMap<object, object>()

/** What two definitions have in common if they are the same task: the declaration that both come from. */
export function declarationOf (definition: AnyTaskDefinition): object {
  return declarations.get(definition) ?? definition
}

/**
 * A task with a name. `defineTask` makes the definition, the option `tasks` tells the plugin of it, and `addTask(definition, payload)` adds
 * a task. The options of the definition are its properties, with their defaults.
 * @typeParam Payload what `addTask` takes
 * @typeParam Result what the handler returns
 */
export class TaskDefinition<in Payload = never, out Result = unknown> {
  /** The name of the task, and of its queue in an engine. */
  readonly name: string
  /** The schema of the payload. */
  readonly payload: unknown
  /** Milliseconds for one attempt. `undefined` stands for the plugin's `timeout`. */
  readonly timeout: number | undefined
  /** The outcomes of a request for which the task runs. `undefined` stands for the plugin's `when`. */
  readonly when: TaskCondition | undefined
  /** Whether and when a failed attempt is followed by another one. Times are milliseconds. */
  readonly retry: {
    readonly attempts: number
    readonly backoff: { readonly type: 'exponential' | 'fixed', readonly delay: number, readonly maxDelay: number }
    readonly when: ((error: unknown) => boolean) | undefined
  }

  /** Seconds for which the record of an ended task is kept. */
  readonly keep: { readonly succeeded: number, readonly failed: number }
  /** Runs one attempt. Undefined for a task that has a `file`, and for one that is only declared. */
  readonly handler: ((payload: never, context: TaskContext) => unknown) | undefined
  /** The URL of the module that runs in a thread. Undefined for a task that has a `handler`, and for one that is only declared. */
  readonly file: string | undefined
  /** Called once, when the task has failed for good after an attempt. */
  readonly onFailed: ((payload: never, error: unknown, context: FailedTaskContext) => void | Promise<void>) | undefined
  /** The types of the payload and of the result. This property does not exist at run time. @hidden */
  declare readonly '~types'?: { readonly payload: (payload: Payload) => void, readonly result: Result }

  /**
   * @internal
   * @param where the function that was called, for errors
   * @param declaration what the task was declared by
   */
  constructor (options: AnyOptions, where: 'defineTask' | 'declareTask' | 'handledBy' = 'defineTask', declaration?: object) {
    checkDefinition(options, where)
    if (declaration !== undefined) declarations.set(this, declaration)
    const { name, payload, timeout, when, retry, keep, handler, file, onFailed } = options
    const { type = 'exponential', delay = 1_000, maxDelay = 60_000 } = retry?.backoff ?? {}
    this.name = name
    this.payload = payload
    this.timeout = timeout
    // These functions stay as they were checked, whatever becomes of the caller's object. Their `this` is that object, as in its methods.
    this.when = typeof when === 'function' ? methodOf(options, when) : when
    this.retry = { attempts: retry?.attempts ?? 3, backoff: { type, delay, maxDelay }, when: retry?.when && methodOf(retry, retry.when) }
    this.keep = { succeeded: keep?.succeeded ?? 3_600, failed: keep?.failed ?? 604_800 }
    this.handler = handler && methodOf(options, handler)
    this.file = file === undefined ? undefined : hrefOf(file)
    this.onFailed = onFailed && methodOf(options, onFailed)
  }

  /**
   * Milliseconds between a failure and the next attempt.
   * @param failures how often the task has failed so far
   */
  backoffMs (failures: number): number {
    const { type, delay, maxDelay } = this.retry.backoff
    // A delay of 0 stays 0. The product would be no number where the power is Infinity.
    return Math.min(type === 'fixed' || delay === 0 ? delay : delay * 2 ** (failures - 1), maxDelay)
  }
}

markOurs(TaskDefinition.prototype)

/** Any definition. */
export type AnyTaskDefinition = TaskDefinition<never, unknown>

/**
 * The types of `defineTask`. The type of the payload comes from its schema.
 * @throws FST_BGT_INVALID_OPTION with the option, what was passed and what is accepted
 */
export interface DefineTask {
  /** With a file in place of a handler, and a Standard Schema. */
  <S extends StandardSchema>(options: { readonly payload: S } & TaskFileOptions<InferOutput<S>>): TaskDefinition<InferInput<S>>
  /** With a file in place of a handler, and a schema of `@sinclair/typebox`. */
  <S extends { static: unknown }>(options: { readonly payload: S } & TaskFileOptions<S['static']>): TaskDefinition<S['static']>
  /** With a file in place of a handler, and plain JSON Schema or no schema: the type of the payload is written by hand. */
  <Payload>(options: { readonly payload?: object } & TaskFileOptions<Payload>): TaskDefinition<Payload>
  /** With a Standard Schema (zod, valibot, arktype, …). `addTask` takes the schema's input, and the handler gets its output. */
  <S extends StandardSchema, Result>(
    options: { readonly payload: S } & TaskDefinitionOptions<InferOutput<S>, Result>
  ): TaskDefinition<InferInput<S>, Result>
  /** With a schema of `@sinclair/typebox`. */
  <S extends { static: unknown }, Result>(
    options: { readonly payload: S } & TaskDefinitionOptions<S['static'], Result>
  ): TaskDefinition<S['static'], Result>
  /**
   * With plain JSON Schema or without a schema, and with a type that is written by hand. A schema of `typebox` 1.x does not carry its type,
   * which would be lost silently. So such a schema is refused unless a type is written.
   */
  <Payload, Result = unknown, Schema extends object = object>(
    options: {
      readonly payload?: Schema & ([unknown, Schema] extends [Payload, { readonly '~kind': unknown }]
        ? { readonly '~kind': 'typebox 1.x: use defineTask.withTypeProvider<TypeBoxTypeProvider>()({ … })' }
        : Schema)
    } & TaskDefinitionOptions<Payload, Result>
  ): TaskDefinition<Payload, Result>
  /** Makes a `defineTask` whose payload types come from a type provider of Fastify. */
  withTypeProvider: <Provider extends FastifyTypeProvider>() => <const S, Result>(
    options: { readonly payload: S } & TaskDefinitionOptions<(Provider & { schema: S })['validator'], Result>
  ) => TaskDefinition<(Provider & { schema: S })['validator'], Result>
}

const define = (options: AnyOptions): AnyTaskDefinition => new TaskDefinition(options)

/**
 * Defines a task that has a name. Its payload is checked and takes a JSON round trip, its failed attempts are retried, and it can be moved
 * to an engine. See {@link DefineTask} for the schemas, and {@link TaskDefinitionOptions} for the other options.
 * @throws FST_BGT_INVALID_OPTION with the option, what was passed and what is accepted
 */
// The interface has a type for each kind of call. At run time all calls are the same.
export const defineTask = Object.assign(define, { withTypeProvider: () => define }) as unknown as DefineTask

const QUEUE_NAME: Rule = {
  accepts: 'letters, digits, "-", "_" and "."',
  test: value => NAME.test(value) && /^[\w.-]{1,128}$/.test(value as string)
}

const SCHEMA: Rule = {
  accepts: 'a JSON Schema or a Standard Schema',
  test: value => OBJECT.test(value) || isStandardSchema(value)
}

const DEFINITION_RULES: Rules = {
  name: QUEUE_NAME,
  payload: SCHEMA,
  timeout: DURATION,
  retry: { ...OBJECT, accepts: 'an object of attempts, backoff and when' },
  when: CONDITION,
  keep: { ...OBJECT, accepts: 'an object of succeeded and failed, in seconds' },
  handler: FUNCTION,
  file: { accepts: 'an absolute file: URL or path', test: value => hrefOf(value) !== undefined },
  onFailed: FUNCTION
}
const { handler: _handler, file: _file, onFailed: _onFailed, ...DECLARATION_RULES } = DEFINITION_RULES
const RETRY_RULES: Rules = { attempts: COUNT, backoff: { ...OBJECT, accepts: 'an object of type, delay and maxDelay, in milliseconds' }, when: FUNCTION }
const BACKOFF_TYPE: Rule = { accepts: '\'exponential\' or \'fixed\'', test: value => value === 'exponential' || value === 'fixed' }
const BACKOFF_RULES: Rules = { type: BACKOFF_TYPE, delay: DELAY, maxDelay: DELAY }
const KEEP_RULES: Rules = { succeeded: SECONDS, failed: SECONDS }

function checkDefinition (options: AnyOptions, caller: string): void {
  check(caller, options, caller === 'declareTask' ? DECLARATION_RULES : DEFINITION_RULES)
  const { name, handler, file } = options
  const needs = name === undefined ? '"name"' : caller === 'defineTask' && (handler === undefined) === (file === undefined) ? 'either "handler" or "file"' : undefined
  if (needs !== undefined) throw new FST_BGT_INVALID_OPTION(`${caller} needs the option ${needs}; received ${Object.keys(options).join(', ') || 'none'}`)
  const where = `the task "${options.name}"`
  check(`retry of ${where}`, options.retry ?? {}, RETRY_RULES)
  check(`backoff of ${where}`, options.retry?.backoff ?? {}, BACKOFF_RULES)
  check(`keep of ${where}`, options.keep ?? {}, KEEP_RULES)
  if (isStandardSchema(options.payload) && isAsync(options.payload)) {
    throw new FST_BGT_INVALID_OPTION(`The option "payload" of ${where} accepts a synchronous schema, because addTask is synchronous; received an asynchronous one`)
  }
}

/** The URL of a file. Undefined for what is neither an absolute `file:` URL nor an absolute path. A URL may be one of another realm. */
function hrefOf (file: unknown): string | undefined {
  return readOr(undefined, () => {
    if (typeof file !== 'string' && Object.prototype.toString.call(file) !== '[object URL]') return undefined
    const text = String(file)
    if (isAbsolute(text)) return pathToFileURL(text).href
    // A URL with a host, for example, has no path.
    return /^file:\//i.test(text) && fileURLToPath(text) !== '' ? new URL(text).href : undefined
  })
}

/**
 * Whether a schema is asynchronous. Some schemas tell only when they validate something. A schema that does not tell even then is refused
 * with the first payload.
 */
function isAsync (schema: StandardSchema): boolean {
  if ((schema as { async?: unknown }).async === true) return true
  try {
    return isThenable(schema['~standard'].validate(undefined))
  } catch {
    return false
  }
}
