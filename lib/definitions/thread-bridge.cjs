'use strict'

// What a thread loads for a task that has a `file`. A pool passes one argument to one function, and a task needs its file, too. This is plain
// JavaScript, because the compiler would make a `require` of the `import` below.

/**
 * Runs the default export of a file.
 * @param {{ name: string, file: string, payload: unknown, context: object }} task
 * @returns {Promise<{ json?: string, refused?: string, error?: { name: string, message: string, code?: string, stack?: string } }>}
 */
async function run ({ name, file, payload, context }) {
  let result
  try {
    result = await (await handlerOf(name, file))(payload, context)
  } catch (error) {
    return { error: toPlain(error) }
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

/** What of an error passes to the other thread. Anything can be thrown, and its properties may throw, too. */
function toPlain (error) {
  const read = key => {
    try {
      const value = error[key]
      return typeof value === 'string' || (key === 'code' && typeof value === 'number') ? String(value) : undefined
    } catch {
      return undefined
    }
  }
  if (!(error instanceof Error)) return { name: 'Error', message: `a ${error === null ? 'null' : typeof error} was thrown` }
  return { name: read('name') ?? 'Error', message: read('message') ?? '', code: read('code'), stack: read('stack') }
}

module.exports = run
module.exports.default = run
module.exports.BRIDGE = __filename
