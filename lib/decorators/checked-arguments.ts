/** What the methods of the app that ask for a definition and an id check of their arguments. */
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
 * @throws FST_BGT_INVALID_TASK if `definition` is no definition, or `id` is no string
 * @throws FST_BGT_CLOSED after `app.close()`
 */
export function checkLookup ({ runner }: Intake, where: string, definition: AnyTaskDefinition, id: string): void {
  refuseOthers(where, definition)
  if (typeof id !== 'string') throw new FST_BGT_INVALID_TASK(`${where} accepts a definition and the id of a task; received ${typeOf(id)} for the id`)
  if (runner.isClosed) throw new FST_BGT_CLOSED(where)
}
