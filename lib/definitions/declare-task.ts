import type { FastifyTypeProvider } from 'fastify'
import { FST_BGT_INVALID_OPTION, typeOf } from '../errors.js'
import { isFunction, methodOf } from '../foreign.js'
import { check, FUNCTION } from '../rules.js'
import { TaskDefinition, type TaskContext, type TaskDeclarationOptions, type TaskFailureOptions } from './define-task.js'
import type { InferInput, InferOutput, StandardSchema } from './standard-schema.js'

/**
 * A task without what runs it, for processes that only add it. It is added, enqueued and read like a definition, and the definition that
 * `handledBy` makes is the same task.
 * @typeParam Payload what `addTask` takes
 * @typeParam Output what the handler gets
 */
export class TaskDeclaration<in Payload = never, out Output = unknown> extends TaskDefinition<Payload> {
  /** @internal */
  constructor (options: TaskDeclarationOptions & { readonly payload?: unknown }) {
    super(options, 'declareTask')
  }

  /**
   * Makes the definition of this task, for processes that run it.
   * @param handler runs one attempt. What it returns, as JSON, is the result of the task
   * @throws FST_BGT_INVALID_OPTION if it is neither a function nor a file
   */
  handledBy<Result>(handler: (payload: Output, context: TaskContext) => Result | Promise<Result>, more?: TaskFailureOptions<Output>): TaskDefinition<Payload, Result>
  /**
   * Makes the definition of this task, for processes that run it in a thread.
   * @param file a `file:` URL or an absolute path, see `TaskFileOptions`
   */
  handledBy (file: URL | string, more?: TaskFailureOptions<Output>): TaskDefinition<Payload>
  handledBy (work: unknown, more: TaskFailureOptions<Output> = {}): TaskDefinition<Payload> {
    check(`handledBy of the task "${this.name}"`, more, { onFailed: FUNCTION })
    if (typeof work === 'function' ? !isFunction(work) : work === undefined || work === null) {
      throw new FST_BGT_INVALID_OPTION(`handledBy of the task "${this.name}" accepts a handler, or an absolute file: URL or path; received ${typeOf(work)}`)
    }
    const own = typeof work === 'function' ? { handler: work } : { file: work }
    const { name, payload, timeout, when, retry, keep } = this
    const { onFailed } = more
    return new TaskDefinition({ name, payload, timeout, when, retry, keep, ...own, onFailed: onFailed && methodOf(more, onFailed) } as never, 'handledBy', this)
  }
}

/**
 * The types of `declareTask`. The type of the payload comes from its schema.
 * @throws FST_BGT_INVALID_OPTION with the option, what was passed and what is accepted
 */
export interface DeclareTask {
  /** With a Standard Schema (zod, valibot, arktype, …). `addTask` takes the schema's input, and the handler gets its output. */
  <S extends StandardSchema>(options: { readonly payload: S } & TaskDeclarationOptions): TaskDeclaration<InferInput<S>, InferOutput<S>>
  /** With a schema of `@sinclair/typebox`. */
  <S extends { static: unknown }>(options: { readonly payload: S } & TaskDeclarationOptions): TaskDeclaration<S['static'], S['static']>
  /** With plain JSON Schema or without a schema, and with a type that is written by hand. A schema of `typebox` 1.x is refused unless a type is written. */
  <Payload, Schema extends object = object>(
    options: {
      readonly payload?: Schema & ([unknown, Schema] extends [Payload, { readonly '~kind': unknown }]
        ? { readonly '~kind': 'typebox 1.x: use declareTask.withTypeProvider<TypeBoxTypeProvider>()({ … })' }
        : Schema)
    } & TaskDeclarationOptions
  ): TaskDeclaration<Payload, Payload>
  /** Makes a `declareTask` whose payload types come from a type provider of Fastify. */
  withTypeProvider: <Provider extends FastifyTypeProvider>() => <const S>(
    options: { readonly payload: S } & TaskDeclarationOptions
  ) => TaskDeclaration<(Provider & { schema: S })['validator'], (Provider & { schema: S })['validator']>
}

const declare = (options: TaskDeclarationOptions): TaskDeclaration => new TaskDeclaration(options)

/**
 * Declares a task that other processes run. See {@link DeclareTask} for the schemas, and {@link TaskDeclarationOptions} for the other options.
 * @throws FST_BGT_INVALID_OPTION with the option, what was passed and what is accepted
 */
// The interface has a type for each kind of call. At run time all calls are the same.
export const declareTask = Object.assign(declare, { withTypeProvider: () => declare }) as unknown as DeclareTask
