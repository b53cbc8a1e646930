import type { FastifyBaseLogger, FastifyInstance, FastifyTypeProvider } from 'fastify'
import { CONDITION, type TaskCondition } from '../tasks/task-options.js'
import { check, COUNT, DURATION, FUNCTION, NAME, OBJECT, SECONDS, DELAY, type Rule, type Rules } from '../rules.js'
import { FST_BGT_INVALID_OPTION, markOurs } from '../errors.js'
import { isThenable } from '../foreign.js'
import { isStandardSchema, type InferInput, type InferOutput, type StandardSchema } from './standard-schema.js'

/** What a handler is given beside the payload. */
export interface TaskContext {
  /** The task's, the same in each attempt. */
  readonly id: string
  /** 1 for the first start. A start is an attempt, whether the handler fails or its process dies. */
  readonly attempt: number
  /** Aborts at the attempt's timeout, with `FST_BGT_TIMEOUT` as reason, and at the deadline of the drain. */
  readonly signal: AbortSignal
  /** The request's logger where the task was added here, else the app's with the request's id. */
  readonly log: FastifyBaseLogger
  /** The app that runs the task. */
  readonly app: FastifyInstance
  /** `traceparent`, `tracestate` and `baggage` of the request, and what a subscriber of the `enqueue` channel added. */
  readonly headers: Readonly<Record<string, string>>
  /** Id of the request that added the task. */
  readonly requestId: string | undefined
}

/** What `onFailed` is given beside the payload and the error. */
export interface FailedTaskContext {
  /** The task's, the same as in its attempts. */
  readonly id: string
  /** Starts that the task had. */
  readonly attempts: number
  /** As in its attempts. */
  readonly log: FastifyBaseLogger
  /** The app that ran the last attempt. */
  readonly app: FastifyInstance
}

/** When a failed attempt starts again. */
export interface RetryPolicy {
  /**
   * Starts at most, those whose process died included.
   * @default 3
   */
  readonly attempts?: number | undefined
  /** Milliseconds between a failure and the next start: `delay`, or `delay * 2 ** (failures - 1)` up to `maxDelay`. */
  readonly backoff?: {
    /** Whether the wait doubles with each failure. @default 'exponential' */
    readonly type?: 'exponential' | 'fixed' | undefined
    /** Milliseconds before the second start. @default 1000 */
    readonly delay?: number | undefined
    /** Milliseconds that no wait exceeds. @default 60000 */
    readonly maxDelay?: number | undefined
  } | undefined
  /** Whether this error is worth another attempt, asked synchronously: a promise fails the task. @default every error is */
  readonly when?: ((error: unknown) => boolean) | undefined
}

/** What a definition says beside its payload. */
export interface TaskDefinitionOptions<Payload, Result> {
  /** Letters, digits, `-`, `_` and `.`; the name of its queue in an engine. */
  readonly name: string
  /** Milliseconds for one attempt; one that takes longer has failed with `FST_BGT_TIMEOUT`. @default the plugin's `timeout` */
  readonly timeout?: number | undefined
  /** How often, and how soon, a failed attempt is followed by another. @default 3 attempts, with exponential backoff */
  readonly retry?: RetryPolicy | undefined
  /** Which outcomes of an exchange the task runs for. @default the plugin's `when` */
  readonly when?: TaskCondition | undefined
  /** Seconds for which the record of an ended task is kept. @default { succeeded: 3600, failed: 604800 } */
  readonly keep?: {
    /** Seconds. @default 3600 */
    readonly succeeded?: number | undefined
    /** Seconds. @default 604800 */
    readonly failed?: number | undefined
  } | undefined

  /** One attempt. What it returns, as JSON, is the result. */
  handler (payload: Payload, context: TaskContext): Result | Promise<Result>
  /** Called once, after the last attempt; not for a payload that a worker found invalid. Its own failure is logged. */
  onFailed? (payload: Payload, error: unknown, context: FailedTaskContext): void | Promise<void>
}

/**
 * A named task: made by `defineTask`, told to the plugin by `tasks`, added with `addTask(definition, payload)`. It has its
 * options as properties, with their defaults.
 * @typeParam Payload what `addTask` takes
 * @typeParam Result what the handler returns
 */
export class TaskDefinition<in Payload = never, out Result = unknown> {
  /** Of its queue, too. */
  readonly name: string
  /** The schema. */
  readonly payload: unknown
  /** Milliseconds; `undefined`: the plugin's. */
  readonly timeout: number | undefined
  /** `undefined`: the plugin's. */
  readonly when: TaskCondition | undefined
  /** When a failed attempt starts again; times are milliseconds. */
  readonly retry: {
    readonly attempts: number
    readonly backoff: { readonly type: 'exponential' | 'fixed', readonly delay: number, readonly maxDelay: number }
    readonly when: ((error: unknown) => boolean) | undefined
  }

  /** Seconds for which the record of an ended task is kept. */
  readonly keep: { readonly succeeded: number, readonly failed: number }
  /** One attempt. */
  readonly handler: (payload: never, context: TaskContext) => unknown
  /** Called once, after the last attempt. */
  readonly onFailed: ((payload: never, error: unknown, context: FailedTaskContext) => void | Promise<void>) | undefined
  /** Only in the types. @hidden */
  declare readonly '~types'?: { readonly payload: (payload: Payload) => void, readonly result: Result }

  /** @internal */
  constructor (options: TaskDefinitionOptions<never, unknown> & { readonly payload?: unknown }) {
    checkDefinition(options)
    const { name, payload, timeout, when, retry, keep } = options
    const { type = 'exponential', delay = 1_000, maxDelay = 60_000 } = retry?.backoff ?? {}
    this.name = name
    this.payload = payload
    this.timeout = timeout
    this.when = when
    this.retry = { attempts: retry?.attempts ?? 3, backoff: { type, delay, maxDelay }, when: retry?.when }
    this.keep = { succeeded: keep?.succeeded ?? 3_600, failed: keep?.failed ?? 604_800 }
    // What was checked stays, whatever becomes of the caller's object; `this` is that object, as in a method of it.
    const { handler, onFailed } = options
    this.handler = (payload, context) => Reflect.apply(handler, options, [payload, context]) as unknown
    this.onFailed = onFailed === undefined ? undefined : (payload, error, context) => Reflect.apply(onFailed, options, [payload, error, context]) as void | Promise<void>
  }

  /** Milliseconds until the start after so many failures. */
  backoffMs (failures: number): number {
    const { type, delay, maxDelay } = this.retry.backoff
    // Twice 0 is 0, and 0 times Infinity is no number.
    return Math.min(type === 'fixed' || delay === 0 ? delay : delay * 2 ** (failures - 1), maxDelay)
  }
}

markOurs(TaskDefinition.prototype)

/** Any definition. */
export type AnyTaskDefinition = TaskDefinition<never, unknown>

/**
 * The types of `defineTask`: those of the payload come from its schema.
 * @throws FST_BGT_INVALID_OPTION with the option, what was passed and what is accepted
 */
export interface DefineTask {
  /** With a Standard Schema (zod, valibot, arktype, …): `addTask` takes its input, the handler gets its output. */
  <S extends StandardSchema, Result>(
    options: { readonly payload: S } & TaskDefinitionOptions<InferOutput<S>, Result>
  ): TaskDefinition<InferInput<S>, Result>
  /** With a schema of `@sinclair/typebox`. */
  <S extends { static: unknown }, Result>(
    options: { readonly payload: S } & TaskDefinitionOptions<S['static'], Result>
  ): TaskDefinition<S['static'], Result>
  /**
   * With plain JSON Schema, or none, and a type written by hand. A schema of `typebox` 1.x does not say what its type is: where
   * none is written either, it would be lost without a word.
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

const define = (options: TaskDefinitionOptions<never, unknown>): AnyTaskDefinition => new TaskDefinition(options)

/**
 * Defines a task that has a name: its payload is checked and takes a JSON round trip, it is retried, and it can be moved to
 * an engine. See {@link DefineTask} for the schemas that it takes, and {@link TaskDefinitionOptions} for the rest.
 * @throws FST_BGT_INVALID_OPTION with the option, what was passed and what is accepted
 */
// The interface says what the type of each call is; here they are all one.
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
  onFailed: FUNCTION
}
const RETRY_RULES: Rules = { attempts: COUNT, backoff: { ...OBJECT, accepts: 'an object of type, delay and maxDelay, in milliseconds' }, when: FUNCTION }
const BACKOFF_TYPE: Rule = { accepts: '\'exponential\' or \'fixed\'', test: value => value === 'exponential' || value === 'fixed' }
const BACKOFF_RULES: Rules = { type: BACKOFF_TYPE, delay: DELAY, maxDelay: DELAY }
const KEEP_RULES: Rules = { succeeded: SECONDS, failed: SECONDS }

function checkDefinition (options: TaskDefinitionOptions<never, unknown> & { readonly payload?: unknown }): void {
  check('defineTask', options, DEFINITION_RULES)
  for (const name of ['name', 'handler'] as const) {
    if (options[name] === undefined) throw new FST_BGT_INVALID_OPTION(`defineTask needs the option "${name}"; received ${Object.keys(options).join(', ') || 'none'}`)
  }
  const where = `the task "${options.name}"`
  check(`retry of ${where}`, options.retry ?? {}, RETRY_RULES)
  check(`backoff of ${where}`, options.retry?.backoff ?? {}, BACKOFF_RULES)
  check(`keep of ${where}`, options.keep ?? {}, KEEP_RULES)
  if (isStandardSchema(options.payload) && isAsync(options.payload)) {
    throw new FST_BGT_INVALID_OPTION(`The option "payload" of ${where} accepts a synchronous schema, because addTask is synchronous; received an asynchronous one`)
  }
}

/** Some tell only when they are asked; those that do not even then, are refused with the first payload. */
function isAsync (schema: StandardSchema): boolean {
  if ((schema as { async?: unknown }).async === true) return true
  try {
    return isThenable(schema['~standard'].validate(undefined))
  } catch {
    return false
  }
}
