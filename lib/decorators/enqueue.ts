/** `enqueue` and `get` of the app: one task at once, in whatever placement. */
import { TaskDefinition, type AnyTaskDefinition } from '../definitions/define-task.js'
import type { JobRecord, Receipt } from '../engines/engine.js'
import { FST_BGT_CLOSED, FST_BGT_INVALID_TASK, typeOf } from '../errors.js'
import { attempt, isInstance } from '../foreign.js'
import { JOB_RULES, type JobOptions } from '../definitions/jobs.js'
import { check, OBJECT, type Rules } from '../rules.js'
import type { Runner } from '../runner/runner.js'
import { jobOf } from '../definitions/defined-task.js'
import { TaskList } from '../tasks/task-list.js'

/** Options of `enqueue`. */
export interface EnqueueOptions extends JobOptions {
  /** The caller's transaction, of engines that have them: the job is visible after its commit, and gone after its rollback. @default none */
  readonly tx?: { executeSql: (text: string, values?: unknown[]) => Promise<unknown> } | undefined
}

/** What `enqueue` takes behind a definition. */
export type EnqueueArgs<Payload> = undefined extends Payload
  ? [payload?: Payload, options?: EnqueueOptions]
  : [payload: Payload, options?: EnqueueOptions]

const ENQUEUE_RULES: Rules = {
  ...JOB_RULES,
  tx: {
    accepts: '{ executeSql(text, values) }',
    holds: value => OBJECT.holds(value) && typeof (value as { executeSql?: unknown }).executeSql === 'function'
  }
}

export async function enqueue (runner: Runner, definition: AnyTaskDefinition, payload: unknown, options: EnqueueOptions = {}): Promise<Receipt> {
  refuseOthers('enqueue', definition)
  check('enqueue', options, ENQUEUE_RULES)
  if (runner.closed) throw new FST_BGT_CLOSED('enqueue')
  const { tx, ...jobOptions } = options
  if (tx !== undefined) runner.jobs.refuseUnless('tx', definition)
  const task = runner.jobs.make(definition, payload, jobOptions, undefined, undefined)
  const { id } = task
  const { dispatch } = runner
  if (dispatch === undefined) return addHere()
  try {
    const [receipt = { id, duplicate: false }] = await dispatch.link.enqueue([jobOf(task).toStored()], tx)
    if (!receipt.duplicate) runner.ledger.enqueuedAtOnce(task)
    return receipt
  } catch (err) {
    // What belongs to a transaction cannot run without it.
    if (tx !== undefined || runner.options.fallback !== 'local') throw err
    attempt(() => { runner.log.warn({ err, task: { id, name: definition.name } }, 'background task could not be stored: it runs here') })
    return addHere()
  }

  function addHere (): Receipt {
    if (runner.jobs.history.isTaken(task)) return { id, duplicate: true }
    runner.ledger.admit()
    runner.jobs.history.add(task)
    new TaskList(runner, undefined, 'ended').put(task)
    return { id, duplicate: false }
  }
}

export async function get (runner: Runner, definition: AnyTaskDefinition, id: string): Promise<JobRecord | undefined> {
  refuseOthers('get', definition)
  if (typeof id !== 'string') throw new FST_BGT_INVALID_TASK(`get accepts a definition and the id of a task; received ${typeOf(id)} for the id`)
  if (runner.closed) throw new FST_BGT_CLOSED('get')
  // What is recorded is here, and would not be found there.
  if (runner.recorder !== undefined) runner.jobs.refuseUnless('get', definition)
  const local = runner.jobs.find(definition, id)
  const { dispatch } = runner
  if (dispatch === undefined || local !== undefined) return local
  runner.jobs.refuseUnless('get', definition)
  return await dispatch.link.get(definition.name, id)
}

/** @throws FST_BGT_INVALID_TASK for what is no definition */
function refuseOthers (where: string, definition: unknown): void {
  if (isInstance(definition, TaskDefinition)) return
  throw new FST_BGT_INVALID_TASK(`${where} accepts a definition, which defineTask makes; received ${typeOf(definition)}`)
}
