import { isGeneratorFunction, readOr } from '../foreign.js'
import type { TaskFunction } from './task-function.js'

/**
 * The name and the kind of the function that was used last. Reading the name of a function, or its prototype, takes as long as a short
 * task, and the tasks of a long list are mostly calls of one function. So both are read once, and remembered until the list has ended.
 */
export class LastFunction {
  #named: TaskFunction | undefined
  #name = ''
  #checked: TaskFunction | undefined

  nameOf (fn: TaskFunction | undefined): string {
    if (fn !== this.#named) {
      this.#name = nameOf(fn)
      this.#named = fn
    }
    return this.#name
  }

  isGenerator (fn: TaskFunction): boolean {
    if (fn === this.#checked) return false
    if (isGeneratorFunction(fn)) return true
    this.#checked = fn
    return false
  }

  forget (): void {
    this.#named = undefined
    this.#checked = undefined
  }
}

/** The name of a function, or `'anonymous'`. The name may be any value: that of a callable proxy is another proxy, and a getter may throw. */
export function nameOf (fn: TaskFunction | undefined): string {
  const name: unknown = readOr(undefined, () => fn?.name)
  return typeof name === 'string' && name !== '' ? name : 'anonymous'
}
