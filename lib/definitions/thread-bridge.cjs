'use strict'

const { isNativeError } = require('node:util').types

// What a thread loads for a task that has a `file`. A pool passes one argument to one function, and a task needs its file, too. This is plain
// JavaScript, because the compiler would make a `require` of the `import` below.

/**
 * Runs the default export of a file.
 * @param {{ name: string, file: string, payload: unknown, context: object }} task
 * @returns {Promise<{ json?: string, refused?: string, error?: { name: string, message: string, code?: string | number, stack?: string }, thrown?: unknown }>}
 */
async function run ({ name, file, payload, context }) {
  let result
  try {
    result = await (await handlerOf(name, file))(payload, context)
  } catch (error) {
    return toThrown(error)
  }
  try {
    return { json: JSON.stringify(result) ?? 'null' }
  } catch (error) {
    return { refused: toPlain(error).message }
  }
}

async function handlerOf (name, file) {
  const exported = await load(name, file)
  // The second one is the default export of a module that was compiled to CommonJS.
  const handler = typeof exported.default === 'function' ? exported.default : exported.default?.default
  if (typeof handler !== 'function') throw new TypeError(`the default export of ${file}, the file of the task "${name}", is not a function`)
  return handler
}

async function load (name, file) {
  try {
    return await import(file)
  } catch (error) {
    throw Object.assign(new Error(`${file}, the file of the task "${name}", cannot be loaded: ${toPlain(error).message}`), { code: toPlain(error).code })
  }
}

/** What was thrown, for the other thread: what is no error passes as it is, if it can be cloned. */
function toThrown (error) {
  if (isError(error)) return { error: toPlain(error) }
  try {
    return { thrown: structuredClone(error) }
  } catch {
    return { error: toPlain(error) }
  }
}

/** Whether a value is an error, of this realm or of another one. A proxy may throw when it is asked. */
function isError (value) {
  try {
    return value instanceof Error || isNativeError(value)
  } catch {
    return false
  }
}

/** What of an error passes to the other thread. Anything can be thrown, and its properties may throw, too. */
function toPlain (error) {
  const read = key => {
    try {
      const value = error[key]
      return typeof value === 'string' || (key === 'code' && typeof value === 'number') ? value : undefined
    } catch {
      return undefined
    }
  }
  if (!isError(error)) return { name: 'Error', message: `a ${error === null ? 'null' : typeof error} was thrown` }
  return { name: read('name') ?? 'Error', message: read('message') ?? '', code: read('code'), stack: read('stack') }
}

module.exports = run
module.exports.default = run
module.exports.BRIDGE = __filename
