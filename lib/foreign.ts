/** Values of other people's code: they may throw, lie or never answer, and are read once. */
import { types } from 'node:util'

const nativeThen = Promise.prototype.then

const [ASYNC, ...GENERATORS] = [async () => {}, function * () {}, async function * () {}].map(Object.getPrototypeOf)

/** Calling such a function runs nothing of it. A bound one has the prototype of what it was made of. */
export function isGeneratorFunction (fn: object): boolean {
  try {
    const prototype: unknown = Object.getPrototypeOf(fn)
    if (prototype === Function.prototype || prototype === ASYNC) return false
    return GENERATORS.includes(prototype) || types.isGeneratorFunction(fn)
  } catch {
    return false
  }
}

/** Whether a value can be called to do something: a call of a generator function runs nothing of it. */
export function isFunction (value: unknown): boolean {
  return typeof value === 'function' && !isGeneratorFunction(value)
}

/** Whether it is the language's own `then`. */
export function isNative (then: unknown): boolean {
  return then === nativeThen
}

/** A promise whose `then` is the language's own, so that one more call of it changes nothing. */
export function isNativePromise (value: unknown): value is Promise<unknown> {
  return typeof value === 'object' && value !== null && (value as Promise<unknown>).then === nativeThen
}

/**
 * The promise of a value that may be a thenable, or undefined if it is none. A thenable may be lazy, as a query builder is, and start
 * its work with each call of `then`: that is read once and called once, here.
 * @throws what reading `then` throws
 */
export function promiseOf (value: unknown): Promise<unknown> | undefined {
  if ((typeof value !== 'object' || value === null) && typeof value !== 'function') return undefined
  const { then } = value as { then?: unknown }
  if (then === nativeThen) return value as Promise<unknown>
  return typeof then === 'function' ? adopt(value, then) : undefined
}

/** @param then what was read of the thenable */
export function adopt (thenable: unknown, then: Function): Promise<unknown> {
  return new Promise((resolve, reject) => { Reflect.apply(then, thenable, [resolve, reject]) })
}

/** `instanceof`, for a value that may be a proxy whose traps throw. */
export function isInstance<T> (value: unknown, type: abstract new (...args: never[]) => T): value is T {
  try {
    return value instanceof type
  } catch {
    return false
  }
}

/** Calls what may throw, such as a logger or a listener of somebody else: the list goes on. */
export function attempt (fn: () => void): void {
  try {
    fn()
  } catch {}
}

/** What `read` returns, or `fallback` if it throws. */
export function readOr<T> (fallback: T, read: () => T): T {
  try {
    return read()
  } catch {
    return fallback
  }
}

/** Whether a value is a promise, where a plain one is expected: somebody's mistake, whose rejection must not end the process. */
export function isThenable (value: unknown): boolean {
  if (types.isPromise(value)) void Reflect.apply(nativeThen, value, [undefined, () => {}])
  return ((typeof value === 'object' && value !== null) || typeof value === 'function') && typeof (value as { then?: unknown }).then === 'function'
}
