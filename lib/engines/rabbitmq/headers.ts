/** Headers that fit in a frame: the server closes a connection over a frame that is too large, whoever else uses it. */
import type { ChannelModel } from 'amqplib'
import { isObject } from '../stored-task.js'

/** Bytes of a frame around the headers: its own, and those of the other properties, of which six are texts of at most 256 bytes. */
const AROUND = 1_600
/** amqplib encodes 64 KiB of headers. */
const MOST = 65_000
/** What every server accepts. */
const LEAST_FRAME = 4_096

/** The most bytes of headers on a connection. The types of amqplib do not have `frameMax`, which is what the server and the client have agreed on. */
export function roomOf ({ connection }: ChannelModel): number {
  const { frameMax } = connection as { readonly frameMax?: unknown }
  const frame = typeof frameMax === 'number' && frameMax >= LEAST_FRAME ? frameMax : LEAST_FRAME
  return Math.min(frame - AROUND, MOST)
}

/**
 * The headers without those that do not fit: the largest is left out first, and never one of this engine.
 * @param leftOut called with the name of each header that is left out
 */
export function fitted<T extends Readonly<Record<string, unknown>>> (headers: T, room: number, leftOut: (name: string) => void): T | Record<string, unknown> {
  if (mostBytesOf(headers) <= room) return headers
  const sizes = Object.keys(headers).map(name => ({ name, size: 1 + Buffer.byteLength(name) + bytesOf(headers[name]) }))
  let total = sizes.reduce((sum, { size }) => sum + size, 4)
  const kept: Record<string, unknown> = { ...headers }
  for (const { name, size } of sizes.sort((a, b) => b.size - a.size)) {
    const isTooLong = Buffer.byteLength(name) > 255
    if ((total <= room && !isTooLong) || name.startsWith('fbt-')) continue
    total -= size
    Reflect.deleteProperty(kept, name)
    leftOut(name)
  }
  if (total > room) throw new RangeError('the context of the request does not fit in a frame of the server')
  return kept
}

/** An upper bound that costs little for headers that are texts. */
function mostBytesOf (headers: Readonly<Record<string, unknown>>): number {
  let sum = 4
  for (const name in headers) {
    const value = headers[name]
    // A name has at most 255 bytes.
    if (name.length > 85) return Infinity
    sum += 6 + 3 * name.length + (typeof value === 'string' ? 3 * value.length : bytesOf(value))
  }
  return sum
}

/** The bytes of a value with its type, in the encoding of the protocol. */
function bytesOf (value: unknown): number {
  if (typeof value === 'string') return 5 + Buffer.byteLength(value)
  if (Buffer.isBuffer(value)) return 5 + value.length
  if (Array.isArray(value)) return value.reduce<number>((sum, item) => sum + bytesOf(item), 5)
  if (isObject(value)) return Object.entries(value).reduce((sum, [name, item]) => sum + 1 + Buffer.byteLength(name) + bytesOf(item), 5)
  return 9
}
