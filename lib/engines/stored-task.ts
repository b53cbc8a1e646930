/**
 * The stored form of a task: its payload, and beside it the headers, the id of the request and the time when it was added. BullMQ and
 * pg-boss store it as the data of a job, RabbitMQ as a message, which has a place for each part. Anybody may store a task, by hand or in another
 * language: each part is checked by itself when it is read, so that one odd part takes no other part with it.
 */
import type { Delivery, Job, JobError, Json } from './engine.js'

/** The data of a job. Only `payload` has to be there. */
export interface StoredTask {
  payload: Json
  /** Trace context, and what a subscriber of the `enqueue` channel added. */
  headers?: Readonly<Record<string, string>>
  /** The id of the request that added the task. */
  requestId?: string
  /** What the option `context` has captured, as JSON. */
  context?: string
  /** Milliseconds since the epoch. */
  enqueuedAt?: number
}

/** The latest time, and before 1970 the earliest, that a `Date` can hold. */
const MAX_TIME = 8_640_000_000_000_000

// Objects are made property by property here: a spread took a third of the processor time that a job costs.

/** A job as its stored form. `enqueuedAt` is left to the adapter, because some libraries have a place for it. */
export function toStored ({ payload, headers, requestId: found, context }: Job): StoredTask {
  const requestId = requestIdOf(found)
  const stored: StoredTask = { payload }
  if (hasAny(headers)) stored.headers = headers
  if (requestId !== undefined) stored.requestId = requestId
  if (context !== undefined) stored.context = context
  return stored
}

/** The JSON of {@link toStored}, put together from parts in a quarter of the time. The payload is JSON already. */
export function toStoredText ({ text, headers, requestId: found, context }: Job): string {
  const requestId = requestIdOf(found)
  const traced = hasAny(headers) ? `,"headers":${JSON.stringify(headers)}` : ''
  const requested = requestId === undefined ? '' : `,"requestId":${JSON.stringify(requestId)}`
  const captured = context === undefined ? '' : `,"context":${JSON.stringify(context)}`
  return `{"payload":${text}${traced}${requested}${captured}}`
}

/**
 * Reads the data of a job, whoever wrote it. Data without a `payload` is the payload itself.
 * @param attempt the number of the attempt, 1 for the first
 * @param enqueuedAt when the task was added, if the library keeps that beside the data
 */
export function toDelivery (task: string, id: string, attempt: number, data: unknown, enqueuedAt?: unknown): Delivery {
  if (!isObject(data) || !Object.hasOwn(data, 'payload')) {
    return { id, task, payload: data, attempt, enqueuedAt: timeOf(enqueuedAt), headers: {}, requestId: undefined, context: undefined }
  }
  const { payload, headers, requestId, context } = data
  return { id, task, payload, attempt, enqueuedAt: timeOf(enqueuedAt ?? data['enqueuedAt']), headers: headersOf(headers), requestId: requestIdOf(requestId), context: textOf(context) }
}

/** When a task was added, as far as its data tells. */
export function enqueuedAtOf (data: unknown): number | undefined {
  return isObject(data) && Object.hasOwn(data, 'payload') ? timeOf(data['enqueuedAt']) : undefined
}

/**
 * The headers that travel with a task: each one that is a text is kept, and each other one is dropped.
 * @param isReserved tells whether a name belongs to the engine or to the server
 */
export function headersOf (found: unknown, isReserved?: (name: string) => boolean): Readonly<Record<string, string>> {
  if (!isObject(found)) return {}
  const isHeader = (name: string): boolean => typeof found[name] === 'string' && isReserved?.(name) !== true
  const names = Object.keys(found)
  // Most tasks have no other headers, and a copy would take several times as long.
  return (names.every(isHeader) ? found : Object.fromEntries(names.filter(isHeader).map(name => [name, found[name]]))) as Record<string, string>
}

/** The value of the option `context`. */
export function textOf (found: unknown): string | undefined {
  return typeof found === 'string' ? found : undefined
}

/** The id of a request. Fastify makes texts, but an app's `genReqId` may count, and other programs store numbers. */
export function requestIdOf (found: unknown): string | undefined {
  if (typeof found === 'number') return String(found)
  return typeof found === 'string' && found !== '' ? found : undefined
}

/** Milliseconds since the epoch, where the value is a time that a `Date` can hold. */
export function timeOf (found: unknown): number | undefined {
  return typeof found === 'number' && Math.abs(found) <= MAX_TIME ? found : undefined
}

/** A time as ISO 8601, whichever way the library tells it. */
export function toIso (time: unknown): string | undefined {
  if (time === null || time === undefined) return undefined
  const date = new Date(time as Date | string | number)
  return Number.isNaN(date.getTime()) ? undefined : date.toISOString()
}

/**
 * Reads the error of an attempt. Other workers, and the libraries themselves, store errors of other shapes.
 * @param message the message, where none was stored
 */
export function readJobError (stored: unknown, message: string): JobError {
  const found: Record<string, unknown> = isObject(stored) ? stored : {}
  return {
    name: typeof found['name'] === 'string' ? found['name'] : 'Error',
    message: typeof found['message'] === 'string' ? found['message'] : message,
    ...(typeof found['code'] === 'string' && { code: found['code'] })
  }
}

export function isObject (value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value)
}

function hasAny (headers: Job['headers']): boolean {
  return Object.keys(headers).length > 0
}
