/** Tasks as messages of RabbitMQ. docs/rabbitmq.md describes the format for workers in other languages. */
import { randomUUID } from 'node:crypto'
import type { Message, Options } from 'amqplib'
import type { Delivery, Job, JobError } from '../engine.js'
import { headersOf, isObject, requestIdOf, textOf, timeOf } from '../stored-task.js'

/** The headers of this engine. All other headers belong to the task, trace context among them. */
const HEADER = {
  /** Attempts before this message was published. Without it there were none. The queue counts later attempts whose process died. */
  attempts: 'fbt-attempts',
  /** Milliseconds that the task still has to wait when it comes to its queue. No two clocks are compared. */
  wait: 'fbt-wait',
  /** What version 0.1 stored in place of the wait: a time of the clock of the process that stored the job, in milliseconds since the epoch. */
  due: 'fbt-due',
  /** What the option `context` has captured, as JSON. */
  context: 'fbt-context'
} as const

/** Headers that the server adds, or takes for an order to deliver a copy elsewhere. */
const SERVER_HEADERS = /^(?:x-death|x-(?:first|last)-death-.*|x-delivery-count|x-acquired-count|x-delivered|CC|BCC)$/
/** Most bytes of a short text of the protocol. */
const MAX_SHORT = 255
/** Most bytes of the message of a stored error, and of its name and code. */
const MAX_MESSAGE = 4_000
const MAX_NAME = 200

export function toContent ({ text }: Job): Buffer {
  return Buffer.from(text)
}

/** @param waitMs the wait that is left when the message comes to its queue, 0 if there is none */
export function toProperties ({ id, task, headers: given, requestId: givenId, enqueuedAt, context }: Job, waitMs: number): Options.Publish {
  // A subscriber may have added any header. The server closes the channel over a `CC` that is a text.
  const headers = headersOf(given, isReserved)
  const requestId = requestIdOf(givenId)
  return {
    mandatory: true,
    persistent: true,
    contentType: 'application/json',
    messageId: id,
    // A client may have chosen the id of its request, and its length.
    correlationId: requestId !== undefined && Buffer.byteLength(requestId) <= MAX_SHORT ? requestId : undefined,
    type: task,
    timestamp: Math.floor(enqueuedAt / 1000),
    // amqplib makes a prototype of the headers that it is given, which is slow in V8, so no headers are better than an empty object.
    headers: waitMs > 0 || context !== undefined ? withOwn(headers, waitMs, context) : Object.keys(headers).length === 0 ? undefined : headers
  } as Options.Publish
}

function withOwn (headers: Job['headers'], waitMs: number, context: string | undefined): Record<string, unknown> {
  const all: Record<string, unknown> = { ...headers }
  if (waitMs > 0) all[HEADER.wait] = waitMs
  if (context !== undefined) all[HEADER.context] = context
  return all
}

/**
 * Reads a message, whoever wrote it. A body that is no JSON is delivered as a text.
 * @param queue the queue that it came from
 */
export function toDelivery (task: string, queue: string, { content, properties, fields }: Message): Delivery {
  const headers = allHeadersOf(properties)
  const { messageId, correlationId, timestamp } = properties as Record<'messageId' | 'correlationId' | 'timestamp', unknown>
  const before = hasDiedIn(queue, headers) ? 0 : countOf(headers[HEADER.attempts])
  return {
    // A message without an id gets another one when it is delivered again after a crash. Nothing better can be done.
    id: typeof messageId === 'string' && messageId !== '' ? messageId : randomUUID(),
    task,
    payload: toPayload(content),
    // The queue has counted only if it has delivered the message before. Otherwise the publisher has sent this count.
    attempt: before + (fields.redelivered ? deliveriesOf(headers) ?? 1 : 0) + 1,
    enqueuedAt: typeof timestamp === 'number' ? timeOf(timestamp * 1000) : undefined,
    headers: headersOf(headers, isReserved),
    requestId: requestIdOf(correlationId),
    context: textOf(headers[HEADER.context])
  }
}

/** Whether a message was delivered before by a queue that does not count that, such as a classic queue. */
export function isUncounted ({ properties, fields }: Message): boolean {
  return fields.redelivered && deliveriesOf(allHeadersOf(properties)) === undefined
}

/** Milliseconds that a message has to wait before it may start. */
export function waitOf ({ properties }: Message): number {
  const { [HEADER.wait]: wait, [HEADER.due]: due } = allHeadersOf(properties)
  const ms = typeof wait === 'number' ? wait : typeof due === 'number' ? due - Date.now() : 0
  return Number.isFinite(ms) && ms > 0 ? ms : 0
}

/** The properties of a copy, which is published in the place of a message. */
export function copyOf ({ properties }: Message, { id, attempts, waitMs = 0 }: { readonly id: string, readonly attempts: number, readonly waitMs?: number }): Options.Publish {
  const headers = headersToKeep(properties)
  if (attempts > 0) headers[HEADER.attempts] = attempts
  if (waitMs > 0) headers[HEADER.wait] = waitMs
  return { ...propertiesOf(properties), messageId: id, headers }
}

/**
 * The properties of a copy for the queue of what has failed for good. If somebody moves it back as it is, it starts from its first attempt.
 * @param room the most bytes of headers
 */
export function failedCopyOf ({ properties }: Message, { id, attempt, error, keepMs, room }: { readonly id: string, readonly attempt: number, readonly error: JobError, readonly keepMs: number, readonly room: number }): Options.Publish {
  const headers = headersToKeep(properties)
  headers['fbt-failed-attempt'] = attempt
  headers['fbt-failed-at'] = new Date().toISOString()
  headers['fbt-error-name'] = cut(error.name, MAX_NAME)
  headers['fbt-error-message'] = cut(error.message, Math.min(MAX_MESSAGE, Math.floor(room / 2)))
  if (error.code !== undefined) headers['fbt-error-code'] = cut(error.code, MAX_NAME)
  return { ...propertiesOf(properties), messageId: id, headers, expiration: String(keepMs) }
}

function propertiesOf (properties: Message['properties']): Options.Publish {
  const { contentType, contentEncoding, type, timestamp, correlationId, appId } = properties as Options.Publish
  return { contentType, contentEncoding, type, timestamp, correlationId, appId, mandatory: true, persistent: true } as Options.Publish
}

/** The headers that a copy takes over: not those of the server, and not those that tell of the attempt before. */
function headersToKeep (properties: Message['properties']): Record<string, unknown> {
  const own = new Set<string>([HEADER.attempts, HEADER.wait, HEADER.due])
  return Object.fromEntries(Object.entries(allHeadersOf(properties)).filter(([name]) => !own.has(name) && !/^fbt-(?:failed|error)-/.test(name) && !SERVER_HEADERS.test(name)))
}

/** Whether the server itself has moved a message out of its queue. Whoever puts it back gives it all its attempts again. */
function hasDiedIn (queue: string, { 'x-death': deaths }: Readonly<Record<string, unknown>>): boolean {
  return Array.isArray(deaths) && deaths.some(death => isObject(death) && death['queue'] === queue)
}

/** What a queue has counted, if it counts. */
function deliveriesOf ({ 'x-delivery-count': count }: Readonly<Record<string, unknown>>): number | undefined {
  return typeof count === 'number' ? countOf(count) : undefined
}

/** Cuts a text at a number of bytes, between two characters. */
function cut (text: string, bytes: number): string {
  if (text.length * 3 <= bytes) return text
  const encoded = Buffer.from(text.slice(0, bytes))
  let end = Math.min(bytes, encoded.length)
  // A byte that begins with the bits 10 continues a character.
  while (end < encoded.length && end > 0 && ((encoded[end] ?? 0) & 0xc0) === 0x80) end--
  return encoded.toString('utf8', 0, end)
}

function allHeadersOf ({ headers }: Message['properties']): Readonly<Record<string, unknown>> {
  return isObject(headers) ? headers : {}
}

/** Whether a header does not belong to the task: its handler does not see it. */
function isReserved (name: string): boolean {
  return name.startsWith('fbt-') || SERVER_HEADERS.test(name)
}

function toPayload (content: Buffer): unknown {
  const text = content.toString()
  try {
    return JSON.parse(text)
  } catch {
    return text
  }
}

function countOf (value: unknown): number {
  return typeof value === 'number' && Number.isSafeInteger(value) && value > 0 ? value : 0
}
