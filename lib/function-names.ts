import { readOr } from './foreign.js'
import type { TaskFunction } from './task-adder.js'

/**
 * Names of functions. Reading `name` of one takes as long as a short task, and the tasks of a long list are mostly calls
 * of one function: the last one is remembered, until the list has ended.
 */
export class FunctionNames {
  #fn: TaskFunction | undefined
  #name = ''

  of (fn: TaskFunction | undefined): string {
    if (fn !== this.#fn) {
      this.#name = nameOf(fn)
      this.#fn = fn
    }
    return this.#name
  }

  forget (): void {
    this.#fn = undefined
  }
}

/** A name may be anything: that of a callable proxy is another proxy, and a getter may throw. */
export function nameOf (fn: TaskFunction | undefined): string {
  const name: unknown = readOr(undefined, () => fn?.name)
  return typeof name === 'string' && name !== '' ? name : 'anonymous'
}
