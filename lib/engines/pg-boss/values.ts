/**
 * Values that come back from `jsonb` as they were. `jsonb` sorts the keys of objects, and refuses the character U+0000, half of a surrogate
 * pair, and very deep nesting. A value whose keys are in another order is stored as it is, with the order of its keys beside it. What `jsonb`
 * refuses is stored as one text, its JSON.
 */
import { PACKAGE } from '../../errors.js'
import { readOr } from '../../foreign.js'
import type { Json } from '../engine.js'
import { isObject } from '../stored-task.js'

/** The name under which the JSON of a value is, in place of the value, or the order of the keys of a result. */
export const MARK = PACKAGE

/**
 * For each object that has at least two keys, in the order in which the value is written: where `jsonb` has its first key, its second, and so
 * on. As a text this is `0,2,1;1,0`.
 */
type KeyOrder = ReadonlyArray<readonly number[]>

/** The places of the keys of one object, as they are stored, and whether `jsonb` keeps their order. */
interface Places {
  readonly text: string
  readonly isKept: boolean
}

/** The most entries of each memory, and the most characters of an entry. The jobs of a definition mostly share a few. */
const MAX_KNOWN = 500
const MAX_LENGTH = 1_000

const knownPlaces = new Map<string, Places>()
const knownOrders = new Map<string, KeyOrder | undefined>()

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
 * The order of the keys, if `jsonb` would change it. The text is short because a row of each job has it: a list of the keys took a third of the
 * processor time that a job costs.
 * @throws RangeError if the value is nested too deeply for `jsonb`
 */
export function keyOrder (value: Json): string | undefined {
  const parts: string[] = []
  return collectOrder(value, parts, 0) ? undefined : parts.join(';')
}

/** @returns whether `jsonb` keeps the order */
function collectOrder (value: Json, parts: string[], depth: number): boolean {
  if (typeof value !== 'object' || value === null) return true
  if (depth > MAX_DEPTH) throw new RangeError('too deep')
  let isKept = true
  if (Array.isArray(value)) {
    for (const item of value) if (!collectOrder(item, parts, depth + 1)) isKept = false
    return isKept
  }
  const keys = Object.keys(value)
  if (keys.length > 1) {
    // No key has the character U+0000, because such a value is stored as text.
    const places = remembered(knownPlaces, keys.join('\0'), () => placesOf(keys))
    parts.push(places.text)
    isKept = places.isKept
  }
  for (const key of keys) if (!collectOrder(value[key] as Json, parts, depth + 1)) isKept = false
  return isKept
}

function placesOf (keys: readonly string[]): Places {
  // V8 has keys such as "7" first, in any object.
  const stored = Object.keys(Object.fromEntries(keys.toSorted(byJsonb).map(key => [key, 0])))
  const placeOf = new Map(stored.map((key, place) => [key, place]))
  const places = keys.map(key => placeOf.get(key))
  return { text: places.join(), isKept: places.every((place, i) => place === i) }
}

/** A value with its keys in this order. If somebody has changed the keys, the value stays as it is. */
export function inKeyOrder (value: unknown, text: string): unknown {
  const order = remembered(knownOrders, text, () => readOrder(text))
  // Somebody may have put a deeper value in the place of ours.
  return order === undefined ? value : readOr(value, () => arranged(value, order))
}

/** Anybody may have written the text. */
function readOrder (text: string): KeyOrder | undefined {
  const order = text.split(';').map(part => part.split(',').map(Number))
  return order.every(places => places.toSorted((a, b) => a - b).every((place, i) => place === i)) ? order : undefined
}

function remembered<T> (known: Map<string, T>, text: string, make: () => T): T {
  const found = known.get(text)
  if (found !== undefined) return found
  const made = make()
  if (text.length > MAX_LENGTH) return made
  if (known.size === MAX_KNOWN) known.clear()
  known.set(text, made)
  return made
}

// Each delivery comes this way, so objects are filled key by key: entries and sets took ten times as long.
function arranged (value: unknown, order: KeyOrder): unknown {
  let next = 0
  const arrange = (value: unknown): unknown => {
    if (typeof value !== 'object' || value === null) return value
    if (Array.isArray(value)) return value.map(arrange)
    const from = value as Record<string, unknown>
    const keys = Object.keys(from)
    const into: Record<string, unknown> = {}
    const places = keys.length > 1 ? order[next++] : undefined
    if (keys.length > 1 && places?.length !== keys.length) throw new RangeError('other keys')
    for (let i = 0; i < keys.length; i++) {
      // A place is the index of a key.
      const key = keys[places?.[i] ?? i] as string
      set(into, key, arrange(from[key]))
    }
    return into
  }
  return arrange(value)
}

/** Sets a property, also one of the name `__proto__`. */
function set (object: Record<string, unknown>, key: string, value: unknown): void {
  if (key === '__proto__') Object.defineProperty(object, key, { value, writable: true, enumerable: true, configurable: true })
  else object[key] = value
}

/** A result as it is stored. */
export function toOutput (value: Json): Json {
  if (!isObject(value) && !Array.isArray(value) && typeof value !== 'string') return value
  const json = JSON.stringify(value)
  // A result with our own name in it would be taken for ours.
  if (!isStorable(json) || (isObject(value) && Object.hasOwn(value, MARK))) return { [MARK]: json }
  return readOr<Json>({ [MARK]: json }, () => {
    const order = keyOrder(value)
    return order === undefined ? value : { value, [MARK]: order }
  })
}

/** What was stored, as it was. Anybody may have written it. */
export function fromOutput (output: unknown): unknown {
  if (!isObject(output) || !Object.hasOwn(output, MARK)) return output
  const { [MARK]: mark, value } = output
  if (typeof mark !== 'string') return output
  return value === undefined ? parse(mark) ?? output : inKeyOrder(value, mark)
}

/** The value of a JSON text, or undefined if it is none. */
export function parse (json: string): unknown {
  return readOr<unknown>(undefined, () => JSON.parse(json))
}

/** `jsonb` has shorter keys first, counted in bytes, and those of one length in the order of their bytes. */
function byJsonb (a: string, b: string): number {
  const [lengthA, lengthB] = [Buffer.byteLength(a), Buffer.byteLength(b)]
  if (lengthA !== lengthB) return lengthA - lengthB
  if (lengthA === a.length && lengthB === b.length) return a < b ? -1 : 1
  return Buffer.compare(Buffer.from(a), Buffer.from(b))
}
