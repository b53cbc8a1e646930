import { inspect } from 'node:util'
import createError from '@fastify/error'
import { isInstance, readOr } from './foreign.js'

/** The name of this package, with which the messages of errors of `register` begin. */
export const PACKAGE = 'fastify-background-tasks'

const OURS = Symbol(PACKAGE)

/** Marks a class of this copy of the package, because several copies may be installed. */
export function markOurs (prototype: object): void {
  Object.defineProperty(prototype, OURS, { value: true })
}

/** What was passed is not a task: 500, a `TypeError`. The message says what was passed and what is accepted. */
export const FST_BGT_INVALID_TASK = createError('FST_BGT_INVALID_TASK', '%s', 500, TypeError)

/** An option has a wrong value: 500, a `TypeError`. The message names the option, the value and what is accepted. */
export const FST_BGT_INVALID_OPTION = createError('FST_BGT_INVALID_OPTION', '%s', 500, TypeError)

/** `maxPending` tasks have not finished: 503, sent with `Retry-After`. */
export const FST_BGT_OVERLOADED = createError(
  'FST_BGT_OVERLOADED',
  'No more background tasks are accepted: %s have not finished, the limit set by maxPending is %s. Retry later',
  503
)

/** Seconds after which a client may try again. */
export const RETRY_AFTER = '1'

/** The error of an overloaded app, with the headers that Fastify's error handler sends along. */
export function overloaded (unfinished: number, maxPending: number): Error {
  return Object.assign(new FST_BGT_OVERLOADED(unfinished, maxPending), { headers: { 'retry-after': RETRY_AFTER } })
}

/** A task ran longer than its `timeout`. This is the reason of the task's signal, and the error of the failed task. */
export const FST_BGT_TIMEOUT = createError(
  'FST_BGT_TIMEOUT',
  'The background task "%s" did not finish within its timeout of %s ms',
  500
)

/** A task was cancelled while it ran (`app.backgroundTasks.cancel`). This is the reason of the task's signal. */
export const FST_BGT_CANCELLED = createError('FST_BGT_CANCELLED', 'The background task "%s" was cancelled', 500)

/** A payload is not what its definition accepts: 500, the route's mistake. The message names path and reason, never the value. */
export const FST_BGT_INVALID_PAYLOAD = createError('FST_BGT_INVALID_PAYLOAD', 'The payload of the task "%s" %s', 500, TypeError)

/** Two definitions have the same name. */
export const FST_BGT_DUPLICATE_TASK = createError(
  'FST_BGT_DUPLICATE_TASK',
  `${PACKAGE}: There are two definitions of the name "%s" in the option "tasks": a name is one queue. Rename one of them, or of a declaration pass only what its handledBy returns`
)

/** A definition is not among the app's `tasks`. */
export const FST_BGT_UNKNOWN_TASK = createError(
  'FST_BGT_UNKNOWN_TASK',
  'The definition "%s" is not one of the app\'s: %s'
)

/** The engine, or an app without an engine, cannot do what was asked: 500, the route's mistake. */
export const FST_BGT_UNSUPPORTED = createError('FST_BGT_UNSUPPORTED', '%s does not support %s', 500)

/**
 * The app is closed, so nothing is stored or read any more: 503. A reply that would promise a task of a definition is replaced by this
 * error.
 */
export const FST_BGT_CLOSED = createError('FST_BGT_CLOSED', '%s was called after the app had closed', 503)

/** A job could not be stored in time: 503, sent with `Retry-After`. The job may have been stored all the same. */
export const FST_BGT_ENGINE_UNAVAILABLE = createError(
  'FST_BGT_ENGINE_UNAVAILABLE',
  'The background task engine "%s" is not available. Retry later',
  503
)

/**
 * The error of an engine that could not do something in time, with the headers that Fastify's error handler sends along. Clients see its
 * message. The reason, which names hosts, is its `cause`, which only the log shows.
 */
export function unavailable (engine: string, reason: string): Error {
  const error = new FST_BGT_ENGINE_UNAVAILABLE(engine, { cause: new Error(reason) })
  return Object.assign(error, { headers: { 'retry-after': RETRY_AFTER } })
}

/** Whether an error tells the client to try again. */
export function isToBeRetried (error: unknown): boolean {
  return isInstance(error, FST_BGT_OVERLOADED) || isInstance(error, FST_BGT_ENGINE_UNAVAILABLE)
}

/** `addTask` of `fastify-background-tasks/ambient` was called where there is no request: 500. */
export const FST_BGT_NO_REQUEST = createError(
  'FST_BGT_NO_REQUEST',
  'There is no request here that addTask could add the task to. Outside a request, call app.backgroundTasks.addTask. Inside a request, register the plugin with ambient: true',
  500
)

/** The plugin is registered already for this app, or for a parent of it. */
export const FST_BGT_ALREADY_REGISTERED = createError(
  'FST_BGT_ALREADY_REGISTERED',
  'fastify-background-tasks is registered already for this app or a parent of it. Register it once: children share it'
)

/**
 * A short, single-line picture of a value that was refused. What follows `://` or the name of a secret is left out, because a value that
 * was passed by mistake may hold a password.
 */
export function show (value: unknown): string {
  if (typeof value === 'function' || isInstance(value, URL)) return typeOf(value)
  const text = readOr(`a ${typeof value} that cannot be shown`, () => inspect(value, { depth: 0, breakLength: Infinity, maxStringLength: 60, maxArrayLength: 3 }))
    .replace(/:\/\/[^]*/, '://...')
    .replace(/((?:pass|secret|token|auth)\w*'?: )[^]*/i, '$1...')
  return text.length > 100 ? `${text.slice(0, 97)}...` : text
}

/** The kind of a value that was passed, without its contents, because arguments and payloads do not belong in a log. */
export function typeOf (value: unknown): string {
  if (value === null || value === undefined) return String(value)
  if (typeof value === 'function') return `the function ${readOr('', () => nonEmpty(value.name)) || '(anonymous)'}`
  if (typeof value !== 'object') return `a ${typeof value}`
  return readOr('an object', () => {
    if (value instanceof Promise) return 'a promise'
    const prototype: unknown = Object.getPrototypeOf(value)
    if (prototype === null) return 'an object (without a prototype)'
    // The constructor is read from the prototype, because an own property `constructor` is part of what was passed.
    const name = nonEmpty((prototype as object).constructor.name) || 'anonymous'
    const isCopy = (name === 'BackgroundTask' || name === 'TaskDefinition') && !(OURS in value)
    return isCopy ? `a ${name} of another copy of ${PACKAGE}: install it once` : `an object (${name})`
  })
}

function nonEmpty (name: unknown): string {
  return typeof name === 'string' ? name : ''
}
