/** What the methods of the app that are about a definition check first. */
import { TaskDefinition, type AnyTaskDefinition } from '../definitions/define-task.js'
import { FST_BGT_CLOSED, FST_BGT_INVALID_TASK, typeOf } from '../errors.js'
import { isInstance } from '../foreign.js'
import type { Intake } from './intake.js'

/** @throws FST_BGT_INVALID_TASK if it is not a definition */
export function refuseOthers (where: string, definition: unknown): void {
  if (isInstance(definition, TaskDefinition)) return
  throw new FST_BGT_INVALID_TASK(`${where} accepts a definition, which defineTask makes; received ${typeOf(definition)}`)
}

/**
 * @throws FST_BGT_INVALID_TASK if it is not a definition
 * @throws FST_BGT_CLOSED after `app.close()`
 * @throws FST_BGT_UNKNOWN_TASK if the app does not know it
 */
export function checkDefinition ({ runner, jobs }: Intake, where: string, definition: AnyTaskDefinition): void {
  refuseOthers(where, definition)
  if (runner.isClosed) throw new FST_BGT_CLOSED(where)
  jobs.require(definition)
}

/**
 * @throws FST_BGT_INVALID_TASK if `definition` is no definition, or `id` is no string
 * @throws FST_BGT_CLOSED after `app.close()`
 * @throws FST_BGT_UNKNOWN_TASK if the app does not know the definition
 */
export function checkLookup (intake: Intake, where: string, definition: AnyTaskDefinition, id: string): void {
  checkDefinition(intake, where, definition)
  if (typeof id !== 'string') throw new FST_BGT_INVALID_TASK(`${where} accepts a definition and the id of a task; received ${typeOf(id)} for the id`)
}
