import { TaskDefinition, type AnyTaskDefinition } from './define-task.js'
import { FST_BGT_DUPLICATE_TASK, FST_BGT_INVALID_OPTION, FST_BGT_UNKNOWN_TASK, PACKAGE, show, typeOf } from '../errors.js'
import { isInstance } from '../foreign.js'
import { payloadReader, type PayloadReader, type SchemaCompiler } from './payload.js'

/** A definition of this app, with its compiled schema. */
export interface CompiledDefinition {
  readonly definition: AnyTaskDefinition
  readonly read: PayloadReader
}

/** The definitions that an app knows. */
export class Definitions {
  readonly #compiled = new Map<string, CompiledDefinition>()

  /** @throws FST_BGT_INVALID_OPTION, FST_BGT_DUPLICATE_TASK */
  constructor (tasks: readonly AnyTaskDefinition[], compile: SchemaCompiler) {
    for (const definition of tasks) {
      if (!isInstance(definition, TaskDefinition)) {
        throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: The option "tasks" of register accepts an array of what defineTask returns; one of them is ${typeOf(definition).includes('another copy') ? typeOf(definition) : show(definition)}`)
      }
      if (this.#compiled.has(definition.name)) throw new FST_BGT_DUPLICATE_TASK(definition.name)
      this.#compiled.set(definition.name, { definition, read: payloadReader(definition, compile) })
    }
  }

  get all (): CompiledDefinition[] {
    return [...this.#compiled.values()]
  }

  named (name: string): CompiledDefinition | undefined {
    return this.#compiled.get(name)
  }

  /** @throws FST_BGT_UNKNOWN_TASK */
  require (definition: AnyTaskDefinition): CompiledDefinition {
    const compiled = this.#compiled.get(definition.name)
    if (compiled?.definition === definition) return compiled
    throw new FST_BGT_UNKNOWN_TASK(definition.name, compiled === undefined
      ? `add it to the option "tasks" of register, which has ${[...this.#compiled.keys()].join(', ') || 'none'}`
      : 'it is another one of that name, so its module may have been loaded twice')
  }
}
