import { declarationOf, TaskDefinition, type AnyTaskDefinition } from './define-task.js'
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

  /**
   * Refuses definitions that this process would have to run and cannot.
   * @param runsHere whether tasks may run in this process without an engine
   * @param consumes whether this process runs the jobs of an engine
   * @throws FST_BGT_INVALID_OPTION
   */
  refuseUnrunnable ({ runsHere, consumes, threads }: { readonly runsHere: boolean, readonly consumes: boolean, readonly threads: object | undefined }): void {
    for (const { definition } of this.all) {
      if (runsHere && isOnlyDeclared(definition)) {
        throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: The option "tasks" of register has the declaration "${definition.name}", which has nothing to run: without an engine, and with fallback, this process runs the task. Pass what its handledBy returns`)
      }
      if ((runsHere || consumes) && definition.file !== undefined && threads === undefined) {
        throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: The task "${definition.name}" has a file, which runs in a thread: pass a pool as the option "threads" of register, for example new Piscina()`)
      }
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
    if (compiled !== undefined && declarationOf(compiled.definition) === declarationOf(definition)) return compiled
    throw new FST_BGT_UNKNOWN_TASK(definition.name, compiled === undefined
      ? `add it to the option "tasks" of register, which has ${[...this.#compiled.keys()].join(', ') || 'none'}`
      : 'it is another one of that name, so its module may have been loaded twice')
  }
}

/** Why this process cannot make an attempt. It may store tasks that it cannot run, and a test may run what was recorded. */
export function whyNotRunnable (definition: AnyTaskDefinition, threads: object | undefined): Error | undefined {
  const { name, file } = definition
  if (isOnlyDeclared(definition)) return new FST_BGT_INVALID_OPTION(`The task "${name}" is only declared in this process: what its handledBy returns can run`)
  if (file === undefined || threads !== undefined) return undefined
  return new FST_BGT_INVALID_OPTION(`The task "${name}" has a file, and this app has no threads: with a pool as the option "threads" of register it can run`)
}

/** Whether a task is declared, and nothing says how it runs. */
export function isOnlyDeclared ({ handler, file }: AnyTaskDefinition): boolean {
  return handler === undefined && file === undefined
}
