/** `enqueue` and `get` of the app, which store and read one task immediately, in the engine or in this process. */
import type { AnyTaskDefinition } from '../definitions/define-task.js'
import type { JobRecord, Receipt } from '../engines/engine.js'
import { FST_BGT_CLOSED, FST_BGT_INVALID_OPTION, typeOf } from '../errors.js'
import { asPartOf } from '../current-request.js'
import { attempt } from '../foreign.js'
import { JOB_RULES, type JobOptions } from '../definitions/jobs.js'
import { check, OBJECT, type Rules } from '../rules.js'
import { checkLookup, refuseOthers } from './checked-arguments.js'
import type { Intake } from './intake.js'

/** Options of `enqueue`. */
export interface EnqueueOptions extends JobOptions {
  /**
   * The caller's transaction, for an engine that supports it. The job is visible after the commit, and does not exist after a rollback.
   * @default none
   */
  readonly tx?: { executeSql: (text: string, values?: unknown[]) => Promise<unknown> } | undefined
}

/** What `enqueue` takes after a definition. */
export type EnqueueArgs<Payload> = undefined extends Payload
  ? [payload?: Payload, options?: EnqueueOptions]
  : [payload: Payload, options?: EnqueueOptions]

const ENQUEUE_RULES: Rules = {
  ...JOB_RULES,
  tx: {
    accepts: '{ executeSql(text, values) }',
    test: value => OBJECT.test(value) && typeof (value as { executeSql?: unknown }).executeSql === 'function'
  }
}

/** The caller's transaction. It keeps the first error of the caller's own code, which says nothing about the engine. */
class CallerTransaction {
  readonly #tx: NonNullable<EnqueueOptions['tx']>
  failure: { readonly error: unknown } | undefined
  #isOver = false

  constructor (tx: NonNullable<EnqueueOptions['tx']>) {
    this.#tx = tx
  }

  async executeSql (text: string, values?: unknown[]): Promise<{ rows: unknown[] }> {
    if (this.#isOver) throw new Error('enqueue has settled')
    try {
      const result = await this.#tx.executeSql(text, values)
      if (!hasRows(result)) throw new FST_BGT_INVALID_OPTION(`The option "tx" of enqueue accepts an executeSql that resolves to { rows: [...] }; it resolved to ${typeOf(result)}`)
      return result
    } catch (error) {
      this.failure ??= { error }
      throw error
    }
  }

  /** From now on the caller may have ended the transaction, so no statement may run in it. */
  end (): void {
    this.#isOver = true
  }
}

function hasRows (result: unknown): result is { rows: unknown[] } {
  return OBJECT.test(result) && Array.isArray((result as { rows?: unknown }).rows)
}

export async function enqueue (intake: Intake, definition: AnyTaskDefinition, payload: unknown, options: EnqueueOptions = {}): Promise<Receipt> {
  const { runner, jobs, dispatch } = intake
  refuseOthers('enqueue', definition)
  check('enqueue', options, ENQUEUE_RULES)
  if (runner.isClosed) throw new FST_BGT_CLOSED('enqueue')
  const { tx, ...jobOptions } = options
  if (tx !== undefined) jobs.refuseUnless('tx', definition)
  const transaction = tx && new CallerTransaction(tx)
  // No request has added it, although one may be served now.
  const task = asPartOf(undefined, () => jobs.make(definition, payload, jobOptions, undefined, undefined))
  const { id } = task
  if (dispatch === undefined) return addHere()
  try {
    const [receipt = { id, duplicate: false }] = await dispatch.link.enqueue([task.toStored()], transaction).finally(() => { transaction?.end() })
    if (!receipt.duplicate) runner.ledger.enqueuedAlone(task)
    return receipt
  } catch (err) {
    if (transaction?.failure !== undefined) throw transaction.failure.error
    // A job that belongs to a transaction must not run if that is rolled back, so it never runs here.
    if (tx !== undefined || !dispatch.fallsBack) throw err
    attempt(() => { runner.log.warn({ err, task: { id, name: definition.name } }, 'background task could not be stored: it runs here') })
    return addHere()
  }

  function addHere (): Receipt {
    if (jobs.history.isTaken(task)) return { id, duplicate: true }
    intake.addAlone(task)
    return { id, duplicate: false }
  }
}

/** @param payload whether the record carries the payload */
export async function get (intake: Intake, definition: AnyTaskDefinition, id: string, payload = false): Promise<JobRecord | undefined> {
  checkLookup(intake, 'get', definition, id)
  return await read(intake, 'get', definition, id, payload)
}

/**
 * Reads a record. An engine that keeps none refuses, also while a test records. A task of this process has one all the same.
 * @throws FST_BGT_UNSUPPORTED
 */
export async function read (intake: Intake, where: string, definition: AnyTaskDefinition, id: string, payload = false): Promise<JobRecord | undefined> {
  const { jobs, recorder } = intake
  if (recorder !== undefined || jobs.find(definition.name, id) === undefined) jobs.refuseUnless('get', definition, where)
  return await intake.read(definition.name, id, payload)
}
