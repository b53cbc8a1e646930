/**
 * Values that come back from `jsonb` as they were. `jsonb` sorts the keys of objects, and refuses the character U+0000, half of a surrogate
 * pair, and very deep nesting. A value whose keys are in another order is stored as it is, with a list of its keys beside it. What `jsonb`
 * refuses is stored as one text, its JSON.
 */
import { PACKAGE } from '../../errors.js'
import { readOr } from '../../foreign.js'
import type { Json } from '../engine.js'
import { isObject } from '../stored-task.js'

/** The name beside a value under which its keys are, or the text in place of a value. */
export const MARK = PACKAGE

/** Keys of each object of a value that has at least two, in the order in which the value is written. */
export type KeyOrder = readonly string[][]

const BACKSLASH = '\\'.charCodeAt(0)
/** What follows `\u` where `jsonb` refuses it. */
const REFUSED = /^(?:0000|d[89a-f])/

/** Levels of nesting that Postgres takes whatever its `max_stack_depth` is. What is deeper is stored as text. */
const MAX_DEPTH = 500

/** Whether `jsonb` accepts a JSON text. In JSON a whole surrogate pair is written as it is, and what `jsonb` refuses is an escape. */
export function isStorable (json: string): boolean {
  // A list of all escapes of a large payload would fill the memory.
  for (let at = json.indexOf('\\u'); at !== -1; at = json.indexOf('\\u', at + 2)) {
    let start = at
    while (json.charCodeAt(start - 1) === BACKSLASH) start--
    // After an odd number of backslashes this one is text.
    if ((at - start) % 2 === 0 && REFUSED.test(json.slice(at + 2, at + 6))) return false
  }
  return true
}

/**
 * The order of the keys, if `jsonb` would change it.
 * @throws RangeError if the value is nested too deeply for `jsonb`
 */
export function keyOrder (value: Json): KeyOrder | undefined {
  if (isInOrder(value)) return undefined
  const order: string[][] = []
  const collect = (value: Json): void => {
    if (Array.isArray(value)) value.forEach(collect)
    if (!isObject(value)) return
    const keys = Object.keys(value)
    if (keys.length > 1) order.push(keys)
    for (const key of keys) collect(value[key] as Json)
  }
  collect(value)
  return order
}

/** A value with its keys in this order. Keys that the order does not name, because somebody has changed the value, come last. */
export function inKeyOrder (value: unknown, order: unknown): unknown {
  // Somebody may have put a deeper value in the place of ours.
  return Array.isArray(order) ? readOr(value, () => arranged(value, order)) : value
}

function arranged (value: unknown, order: readonly unknown[]): unknown {
  const left = order.values()
  const arrange = (value: unknown): unknown => {
    if (Array.isArray(value)) return value.map(arrange)
    if (!isObject(value)) return value
    const keys = Object.keys(value)
    const first: unknown = keys.length > 1 ? left.next().value : undefined
    const known = Array.isArray(first) ? first.filter(key => typeof key === 'string' && Object.hasOwn(value, key)) as string[] : []
    return Object.fromEntries(Array.from(new Set([...known, ...keys]), key => [key, arrange(value[key])]))
  }
  return arrange(value)
}

/** A result as it is stored. */
export function toOutput (value: Json): Json {
  if (!isObject(value) && !Array.isArray(value) && typeof value !== 'string') return value
  const json = JSON.stringify(value)
  // A result with our own name in it would be taken for ours.
  if (!isStorable(json) || (isObject(value) && Object.hasOwn(value, MARK))) return { [MARK]: json }
  return readOr<Json>({ [MARK]: json }, () => {
    const order = keyOrder(value)
    return order === undefined ? value : { value, [MARK]: order as string[][] }
  })
}

/** What was stored, as it was. Anybody may have written it. */
export function fromOutput (output: unknown): unknown {
  if (!isObject(output) || !Object.hasOwn(output, MARK)) return output
  const mark = output[MARK]
  return typeof mark === 'string' ? parse(mark) ?? output : inKeyOrder(output['value'], mark)
}

/** The value of a JSON text, or undefined if it is none. */
export function parse (json: string): unknown {
  return readOr<unknown>(undefined, () => JSON.parse(json))
}

/** `jsonb` has shorter keys first, counted in bytes, and those of one length in the order of their bytes. */
function isInOrder (value: Json, depth = 0): boolean {
  if (typeof value !== 'object' || value === null) return true
  if (depth > MAX_DEPTH) throw new RangeError('too deep')
  if (Array.isArray(value)) return value.every(item => isInOrder(item, depth + 1))
  let before: string | undefined
  for (const key of Object.keys(value)) {
    if (before !== undefined && !isBefore(before, key)) return false
    if (!isInOrder(value[key] as Json, depth + 1)) return false
    before = key
  }
  return true
}

function isBefore (a: string, b: string): boolean {
  const [lengthA, lengthB] = [Buffer.byteLength(a), Buffer.byteLength(b)]
  if (lengthA !== lengthB) return lengthA < lengthB
  return lengthA === a.length && lengthB === b.length ? a < b : Buffer.compare(Buffer.from(a), Buffer.from(b)) < 0
}
