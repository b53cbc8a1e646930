/** Tasks as messages of RabbitMQ. docs/rabbitmq.md describes the format for workers in other languages. */
import { randomUUID } from 'node:crypto'
import type { Message, Options } from 'amqplib'
import type { Delivery, Job, JobError } from '../engine.js'
import { headersOf, isObject, requestIdOf, timeOf } from '../stored-task.js'

/** The headers of this engine. All other headers belong to the task, trace context among them. */
const HEADER = {
  /** Attempts before this message was published. Without it there were none. The queue counts later attempts whose process died. */
  attempts: 'fbt-attempts',
  /** The time before which the task does not start, in milliseconds since the epoch. */
  due: 'fbt-due'
} as const

/** Headers that the server adds, or takes for an order to deliver a copy elsewhere. */
const SERVER_HEADERS = /^(?:x-death|x-(?:first|last)-death-.*|x-delivery-count|x-acquired-count|x-delivered|CC|BCC)$/
/** Most bytes of a short text of the protocol. */
const MAX_SHORT = 255
/** Most characters of headers. amqplib encodes 64 KiB of them; this is half, because the numbers of bytes and characters differ. */
const MAX_HEADERS = 32_768

export function toContent ({ text }: Job): Buffer {
  return Buffer.from(text)
}

export function toProperties ({ id, task, headers, requestId: givenId, enqueuedAt }: Job, dueAt: number | undefined): Options.Publish {
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
    headers: dueAt !== undefined ? { ...headers, [HEADER.due]: dueAt } : Object.keys(headers).length === 0 ? undefined : headers
  } as Options.Publish
}

/** Reads a message, whoever wrote it. A body that is no JSON is delivered as a text. */
export function toDelivery (task: string, { content, properties, fields }: Message): Delivery {
  const headers = allHeadersOf(properties)
  const { messageId, correlationId, timestamp } = properties as Record<'messageId' | 'correlationId' | 'timestamp', unknown>
  return {
    // A message without an id gets another one when it is delivered again after a crash. Nothing better can be done.
    id: typeof messageId === 'string' && messageId !== '' ? messageId : randomUUID(),
    task,
    payload: toPayload(content),
    // The queue has counted only if it has delivered the message before. Otherwise the publisher has sent this count.
    attempt: countOf(headers[HEADER.attempts]) + (fields.redelivered ? countOf(headers['x-delivery-count']) : 0) + 1,
    enqueuedAt: typeof timestamp === 'number' ? timeOf(timestamp * 1000) : undefined,
    headers: headersOf(headers, isReserved),
    requestId: requestIdOf(correlationId)
  }
}

/** The time before which a message may not start, if it has one. */
export function dueAtOf ({ properties }: Message): number | undefined {
  const due = allHeadersOf(properties)[HEADER.due]
  return typeof due === 'number' && Number.isFinite(due) ? due : undefined
}

/** The properties of a copy, which is published in the place of a message. */
export function copyOf ({ properties }: Message, { id, attempts, dueAt }: { readonly id: string, readonly attempts: number, readonly dueAt?: number | undefined }): Options.Publish {
  const headers = headersToKeep(properties)
  if (attempts > 0) headers[HEADER.attempts] = attempts
  if (dueAt !== undefined) headers[HEADER.due] = dueAt
  return { ...propertiesOf(properties), messageId: id, headers }
}

/** The properties of a copy for the queue of what has failed for good. If somebody moves it back as it is, it starts from its first attempt. */
export function failedCopyOf ({ properties }: Message, { id, attempt, error, keepMs }: { readonly id: string, readonly attempt: number, readonly error: JobError, readonly keepMs: number }): Options.Publish {
  const headers = headersToKeep(properties)
  headers['fbt-failed-attempt'] = attempt
  headers['fbt-failed-at'] = new Date().toISOString()
  headers['fbt-error-name'] = error.name.slice(0, 200)
  headers['fbt-error-message'] = error.message.slice(0, 4_000)
  if (error.code !== undefined) headers['fbt-error-code'] = error.code.slice(0, 200)
  return { ...propertiesOf(properties), messageId: id, headers, expiration: String(keepMs) }
}

function propertiesOf (properties: Message['properties']): Options.Publish {
  const { contentType, contentEncoding, type, timestamp, correlationId, appId } = properties as Options.Publish
  return { contentType, contentEncoding, type, timestamp, correlationId, appId, mandatory: true, persistent: true } as Options.Publish
}

/** The headers that a copy takes over: not those of the server, and not those that tell of the attempt before. */
function headersToKeep (properties: Message['properties']): Record<string, unknown> {
  const own = new Set<string>([HEADER.attempts, HEADER.due])
  const entries = Object.entries(allHeadersOf(properties)).filter(([name]) => !own.has(name) && !/^fbt-(?:failed|error)-/.test(name) && !SERVER_HEADERS.test(name))
  const copied = Object.fromEntries(entries)
  // Another client may encode more headers than amqplib does, and a copy has to be possible all the same.
  return JSON.stringify(copied, (_, value: unknown) => typeof value === 'bigint' ? String(value) : value).length <= MAX_HEADERS ? copied : {}
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
