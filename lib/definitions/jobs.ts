import { createHash, randomUUID } from 'node:crypto'
import type { FastifyInstance, FastifyRequest } from 'fastify'
import type { AddedOptions } from '../tasks/task-options.js'
import { requestIdLabelOf } from './attempt-context.js'
import type { AnyTaskDefinition } from './define-task.js'
import { DefinedTask, type JobInput, type TaskSurroundings } from './defined-task.js'
import type { Envelope } from './envelope.js'
import type { CompiledDefinition, Definitions } from './definitions.js'
import { enqueueChannel, publish } from '../tasks/diagnostics.js'
import type { Delivery, TaskEngine, Verdict } from '../engines/engine.js'
import { requestIdOf } from '../engines/stored-task.js'
import { FST_BGT_INVALID_OPTION, FST_BGT_UNSUPPORTED } from '../errors.js'
import { attempt } from '../foreign.js'
import { History } from './history.js'
import { toJson } from './payload.js'
import { isCaptured } from './travelling-context.js'
import { check, DELAY, NAME, type Rules } from '../rules.js'

/** Options of a task of a definition. */
export interface JobOptions {
  /**
   * A key that makes the task's id, so that a repeated call finds the first task. A second task with the same key does not run as long as
   * the first one has a record.
   * @default none
   */
  readonly key?: string | undefined
  /** Milliseconds before the task may start. @default 0 */
  readonly delay?: number | undefined
}

export const JOB_RULES: Rules = { key: NAME, delay: DELAY }
const TRACE_HEADERS = ['traceparent', 'tracestate', 'baggage'] as const

/** Where jobs go: this process, or an engine. */
export type Placement = Pick<TaskEngine<unknown>, 'name' | 'supports'>

export const LOCAL: Placement = { name: 'An app without an engine', supports: { delay: true, key: true, tx: false, get: true, count: true, find: true, retry: true, cancel: true } }

/** Makes tasks of definitions, and knows those of this process. */
export class Jobs {
  readonly history = new History()
  readonly #definitions: Definitions
  readonly #placement: Placement
  /** The surroundings of jobs that no request of this process has added. */
  readonly #outside: TaskSurroundings
  /** Whether the log has it that a context cannot be restored. */
  #hasWarned = false

  constructor (app: FastifyInstance, definitions: Definitions, placement: Placement, { threads, context }: Pick<TaskSurroundings, 'threads' | 'context'>) {
    this.#definitions = definitions
    this.#placement = placement
    this.#outside = { app, log: app.log, requestIdLabel: requestIdLabelOf(app), history: this.history, threads, context }
  }

  /**
   * Makes a task that is to be added.
   * @throws FST_BGT_UNKNOWN_TASK, FST_BGT_INVALID_PAYLOAD, FST_BGT_INVALID_OPTION, FST_BGT_UNSUPPORTED
   */
  make (definition: AnyTaskDefinition, payload: unknown, jobOptions: JobOptions | undefined, options: AddedOptions | undefined, request: FastifyRequest | undefined): DefinedTask {
    const compiled = this.#definitions.require(definition)
    if (options?.name !== undefined) {
      throw new FST_BGT_INVALID_OPTION(`The option "name" of with is for functions: a definition has a name, "${definition.name}"`)
    }
    if (jobOptions !== undefined) check('addTask', jobOptions, JOB_RULES)
    for (const option of ['key', 'delay'] as const) {
      if (jobOptions?.[option] !== undefined) this.refuseUnless(option, definition)
    }
    const text = toJson(definition.name, payload)
    if (definition.payload !== undefined) compiled.read(JSON.parse(text))
    const key = jobOptions?.key
    const envelope: Envelope = {
      id: key === undefined ? randomUUID() : idOf(definition.name, key),
      key,
      delayMs: jobOptions?.delay ?? 0,
      enqueuedAt: Date.now(),
      headers: traceHeadersOf(request),
      // An app's `genReqId` may count.
      requestId: requestIdOf(request?.id),
      context: request === undefined ? undefined : this.#outside.context?.capture(definition.name, request)
    }
    const surroundings = request === undefined ? this.#outside : { ...this.#outside, log: request.log }
    const task = this.#task(compiled, envelope, { text }, surroundings, options)
    if (enqueueChannel.hasSubscribers) publish(enqueueChannel, { task, headers: envelope.headers })
    return task
  }

  /** Makes a task once more that has failed for good, with all its attempts. */
  remake ({ compiled, envelope, input }: DefinedTask): DefinedTask {
    return this.#task(compiled, { ...envelope, delayMs: 0 }, input, this.#outside, undefined)
  }

  /** Makes the task of a delivery. Undefined if this app does not know its definition. */
  deliver (delivery: Delivery, settle: (verdict: Verdict) => void): DefinedTask | undefined {
    const compiled = this.#definitions.named(delivery.task)
    if (compiled === undefined) return undefined
    const { id, attempt, enqueuedAt = Date.now(), headers, requestId, payload: found } = delivery
    const context = this.#contextOf(delivery)
    const envelope: Envelope = { id, key: undefined, delayMs: 0, enqueuedAt, headers: { ...headers }, requestId, context, delivery: { attempt, settle } }
    return this.#task(compiled, envelope, { found }, this.#outside, undefined)
  }

  /** @throws FST_BGT_UNSUPPORTED */
  refuseUnless (option: keyof Placement['supports'], definition: AnyTaskDefinition, what: string = option): void {
    const { name, supports } = this.#placement
    if (supports[option]) return
    const supported = Object.entries(supports).filter(([, does]) => does).map(([what]) => what)
    throw new FST_BGT_UNSUPPORTED(name, `"${what}", which was asked for the task "${definition.name}"; it supports ${supported.join(', ') || 'none of its kind'}`)
  }

  /** The task of this process that has this id, and whose definition has this name. */
  find (name: string, id: string): DefinedTask | undefined {
    const task = this.history.find(id)
    return task?.name === name ? task : undefined
  }

  /** @throws FST_BGT_UNKNOWN_TASK */
  require (definition: AnyTaskDefinition): void {
    this.#definitions.require(definition)
  }

  /** All definitions. */
  get definitions (): AnyTaskDefinition[] {
    return this.#definitions.all.map(({ definition }) => definition)
  }

  /** The captured value of a delivery, if this app can restore it. */
  #contextOf ({ task, context }: Delivery): string | undefined {
    if (context === undefined) return undefined
    const isWhole = isCaptured(context)
    if (isWhole && this.#outside.context !== undefined) return context
    const why = isWhole ? 'a context, and this app has no option "context"' : 'a context that no app of this package has stored'
    if (!this.#hasWarned) attempt(() => { this.#outside.log.warn(`background task "${task}" has ${why}: it runs without`) })
    this.#hasWarned = true
    return undefined
  }

  #task (compiled: CompiledDefinition, envelope: Envelope, input: JobInput, surroundings: TaskSurroundings, options: AddedOptions | undefined): DefinedTask {
    const { timeout, when } = compiled.definition
    const own: AddedOptions = { timeout: options?.timeout ?? timeout, when: options?.when ?? when, isForFailure: options?.isForFailure === true }
    return new DefinedTask(compiled, envelope, input, surroundings, own)
  }
}

/** A UUID that is made from the task's name and key. Its version is 8, whose content RFC 9562 leaves to the maker. */
export function idOf (name: string, key: string): string {
  const hash = createHash('sha256').update(`${name}\0${key}`).digest()
  hash[6] = (hash.readUInt8(6) & 0x0f) | 0x80
  hash[8] = (hash.readUInt8(8) & 0x3f) | 0x80
  const hex = hash.toString('hex')
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20, 32)].join('-')
}

function traceHeadersOf (request: FastifyRequest | undefined): Record<string, string> {
  const headers: Record<string, string> = {}
  if (request === undefined) return headers
  const { headers: all } = request.raw
  for (const name of TRACE_HEADERS) {
    const value = all[name]
    if (typeof value === 'string') headers[name] = value
  }
  return headers
}
