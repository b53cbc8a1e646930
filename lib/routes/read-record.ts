import type { AppBackgroundTasks, FoundRecord } from '../decorators/app-background-tasks.js'
import { cursorBefore } from '../decorators/operating.js'
import type { AnyTaskDefinition } from '../definitions/define-task.js'
import { FST_BGT_UNSUPPORTED } from '../errors.js'
import { isInstance } from '../foreign.js'

/** Records that are looked at first: seldom were more tasks added in one millisecond. */
const FIRST_LOOK = 10
const LATER_LOOKS = 100

/**
 * Reads a record, with the payload if it is asked for and somebody still has it. `get` reads no payloads, so the record is searched for among
 * those that were added in the same millisecond.
 */
export async function readRecord (tasks: AppBackgroundTasks, definition: AnyTaskDefinition, id: string, withPayload: boolean): Promise<FoundRecord | undefined> {
  const record = await tasks.get(definition, id)
  if (record === undefined || !withPayload) return record
  try {
    return await search(tasks, definition, record) ?? record
  } catch (error) {
    if (isInstance(error, FST_BGT_UNSUPPORTED)) return record
    throw error
  }
}

/** Undefined if the record was not found, because its state has changed meanwhile. */
async function search (tasks: AppBackgroundTasks, definition: AnyTaskDefinition, { id, state, enqueuedAt }: FoundRecord): Promise<FoundRecord | undefined> {
  let after = cursorBefore({ enqueuedAt })
  for (let limit = FIRST_LOOK; ; limit = LATER_LOOKS) {
    const { records, next }: { records: readonly FoundRecord[], next?: string } = await tasks.find(definition, { state, limit, after, payload: true })
    const found = records.find(record => record.id === id)
    const last = records.at(-1)
    if (found !== undefined || next === undefined || last === undefined || last.enqueuedAt < enqueuedAt) return found
    after = next
  }
}
