/** Jobs as messages: docs/rabbitmq.md has the format for workers in other languages. */
import { randomUUID } from 'node:crypto'
import type { Message, Options } from 'amqplib'
import type { Delivery, Job, JobError } from '../engine.js'

/** The headers that are this engine's. All others are the job's own, trace context among them. */
const HEADER = {
  /** Starts before this message was published; none: 0. Those whose process died meanwhile are counted by the queue. */
  attempts: 'fbt-attempts',
  /** Milliseconds since the epoch before which it does not start. */
  due: 'fbt-due'
} as const

/** What the server adds, or takes for an order to deliver a copy elsewhere. */
const SERVERS = /^(?:x-death|x-(?:first|last)-death-.*|x-delivery-count|x-acquired-count|x-delivered|CC|BCC)$/
/** Bytes of a short text of the protocol. */
const MAX_SHORT = 255
/** amqplib encodes 64 KiB of headers. Half of it, for numbers of bytes and characters differ. */
const MAX_HEADERS = 32_768

export function toContent ({ text }: Job): Buffer {
  return Buffer.from(text)
}

export function toProperties ({ id, task, headers, requestId, enqueuedAt }: Job, dueAt: number | undefined): Options.Publish {
  return {
    mandatory: true,
    persistent: true,
    contentType: 'application/json',
    messageId: id,
    // A client may have given it.
    correlationId: requestId !== undefined && Buffer.byteLength(requestId) <= MAX_SHORT ? requestId : undefined,
    type: task,
    timestamp: Math.floor(enqueuedAt / 1000),
    // amqplib makes a prototype of what it is given, which V8 is slow at.
    headers: dueAt !== undefined ? { ...headers, [HEADER.due]: dueAt } : Object.keys(headers).length === 0 ? undefined : headers
  } as Options.Publish
}

/** A delivery, of whoever's hand: a body that is no JSON is delivered as text. */
export function toDelivery (task: string, { content, properties, fields }: Message): Delivery {
  const headers = headersOf(properties)
  const { messageId, correlationId, timestamp } = properties as Record<'messageId' | 'correlationId' | 'timestamp', unknown>
  return {
    // Found again after a crash it would have another one, which is all that can be done.
    id: typeof messageId === 'string' && messageId !== '' ? messageId : randomUUID(),
    task,
    payload: toPayload(content),
    // Before it was delivered once, the count is no word of the queue's.
    attempt: countOf(headers[HEADER.attempts]) + (fields.redelivered ? countOf(headers['x-delivery-count']) : 0) + 1,
    enqueuedAt: typeof timestamp === 'number' ? timestamp * 1000 : undefined,
    headers: textsOf(headers),
    requestId: typeof correlationId === 'string' && correlationId !== '' ? correlationId : undefined
  }
}

/** When it may start, if someone has said that. */
export function dueAtOf ({ properties }: Message): number | undefined {
  const due = headersOf(properties)[HEADER.due]
  return typeof due === 'number' && Number.isFinite(due) ? due : undefined
}

/** A copy of a message, to be published in its place. */
export function copyOf ({ properties }: Message, { id, attempts, dueAt }: { readonly id: string, readonly attempts: number, readonly dueAt?: number | undefined }): Options.Publish {
  const headers = kept(headersOf(properties))
  if (attempts > 0) headers[HEADER.attempts] = attempts
  if (dueAt !== undefined) headers[HEADER.due] = dueAt
  return { ...propertiesOf(properties), messageId: id, headers }
}

/** A copy for the queue of what has failed. Put back as it is, it starts from its first attempt. */
export function failedCopyOf ({ properties }: Message, { id, attempt, error, keepMs }: { readonly id: string, readonly attempt: number, readonly error: JobError, readonly keepMs: number }): Options.Publish {
  const headers = kept(headersOf(properties))
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

/** The headers that a copy has, too: neither the server's nor what was said of the start before. */
function kept (headers: Readonly<Record<string, unknown>>): Record<string, unknown> {
  const own = new Set<string>([HEADER.attempts, HEADER.due])
  const entries = Object.entries(headers).filter(([name]) => !own.has(name) && !/^fbt-(?:failed|error)-/.test(name) && !SERVERS.test(name))
  const copied = Object.fromEntries(entries)
  // Someone else's client may encode more, and a copy has to be possible.
  return JSON.stringify(copied, (_, value: unknown) => typeof value === 'bigint' ? String(value) : value).length <= MAX_HEADERS ? copied : {}
}

function headersOf ({ headers }: Message['properties']): Readonly<Record<string, unknown>> {
  return typeof headers === 'object' && headers !== null ? headers : {}
}

/** What travels with the job for the handler: texts that are neither this engine's nor the server's. */
function textsOf (headers: Readonly<Record<string, unknown>>): Record<string, string> {
  return Object.fromEntries(Object.entries(headers).filter((entry): entry is [string, string] =>
    typeof entry[1] === 'string' && !entry[0].startsWith('fbt-') && !SERVERS.test(entry[0])))
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
