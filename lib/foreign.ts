/** Functions for values that other people's code has made. Such values may throw, lie or never answer, so each of them is read once. */
import { types } from 'node:util'

const nativeThen = Promise.prototype.then

const [ASYNC, ...GENERATORS] = [async () => {}, function * () {}, async function * () {}].map(Object.getPrototypeOf)

/**
 * Whether a function is a generator function. A call of one runs none of its code. A bound function has the prototype of the function that
 * was bound.
 */
export function isGeneratorFunction (fn: object): boolean {
  try {
    const prototype: unknown = Object.getPrototypeOf(fn)
    if (prototype === Function.prototype || prototype === ASYNC) return false
    return GENERATORS.includes(prototype) || types.isGeneratorFunction(fn)
  } catch {
    return false
  }
}

/** Whether a value is a function that does something when it is called. A call of a generator function runs none of its code. */
export function isFunction (value: unknown): boolean {
  return typeof value === 'function' && !isGeneratorFunction(value)
}

/** Whether `then` is the language's own. */
export function isNative (then: unknown): boolean {
  return then === nativeThen
}

/** Whether a value is a promise whose `then` is the language's own, so that one more call of `then` changes nothing. */
export function isNativePromise (value: unknown): value is Promise<unknown> {
  return typeof value === 'object' && value !== null && (value as Promise<unknown>).then === nativeThen
}

/**
 * The promise of a value that may be a thenable, or undefined if the value is none. A thenable may be lazy, as a query builder is, and
 * start its work with each call of `then`. So `then` is read once and called once, here.
 * @throws what reading `then` throws
 */
export function promiseOf (value: unknown): Promise<unknown> | undefined {
  if ((typeof value !== 'object' || value === null) && typeof value !== 'function') return undefined
  const { then } = value as { then?: unknown }
  if (then === nativeThen) return value as Promise<unknown>
  return typeof then === 'function' ? adopt(value, then) : undefined
}

/**
 * A promise that settles as a thenable does.
 * @param then the thenable's `then`, which was read before
 */
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

/** A function that calls a method on the object that it was read from. It stays what it was, whatever becomes of the object. */
export function methodOf<Args extends unknown[], Result> (owner: object, method: (...args: Args) => Result): (...args: Args) => Result {
  return (...args) => Reflect.apply(method, owner, args) as Result
}

/** Calls something that may throw, such as a logger or a listener of somebody else, and ignores its error, so that the list goes on. */
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

/**
 * Whether a value is a promise, where a plain value is expected. Such a promise is somebody's mistake, and its rejection must not end the
 * process.
 */
export function isThenable (value: unknown): boolean {
  if (types.isPromise(value)) void Reflect.apply(nativeThen, value, [undefined, () => {}])
  return ((typeof value === 'object' && value !== null) || typeof value === 'function') && typeof (value as { then?: unknown }).then === 'function'
}
