/** What an operator asks of tasks of definitions: how many there are, which, start one again, stop one, wait for one, and is all well. */
import { asPartOf } from '../current-request.js'
import type { AnyTaskDefinition } from '../definitions/define-task.js'
import type { DefinedTask } from '../definitions/defined-task.js'
import { hasEnded } from '../dispatch/result-waits.js'
import type { JobCounts, JobQuery, JobRecord, JobState } from '../engines/engine.js'
import { timeOf } from '../engines/stored-task.js'
import { FST_BGT_CANCELLED, FST_BGT_INVALID_OPTION, show } from '../errors.js'
import { BOOLEAN, check, NAME, type Rule, type Rules } from '../rules.js'
import { checkDefinition, checkLookup } from './checked-arguments.js'
import { read } from './enqueue.js'
import type { Intake } from './intake.js'

/** Options of `app.backgroundTasks.find()`. */
export interface FindOptions {
  /** The state of the records. Required. */
  readonly state: JobState
  /**
   * The most records, 1 to 500.
   * @default 50
   */
  readonly limit?: number | undefined
  /**
   * Where to go on: the `next` of the page before.
   * @default the newest record
   */
  readonly after?: string | undefined
  /**
   * Whether the records carry their payloads, which may hold what not every operator may see.
   * @default false
   */
  readonly payload?: boolean | undefined
}

/** Options of `app.backgroundTasks.result()`. */
export interface ResultOptions {
  /** Milliseconds to wait, 0 to 60,000. With 0 the record is looked at once. Required. */
  readonly timeout: number
}

/** What `app.backgroundTasks.health()` returns. */
export interface TaskHealth {
  /** The name of the engine. Null without an engine. */
  readonly engine: string | null
  /** Whether the engine can be reached now. True without an engine. */
  readonly connected: boolean
  /** The names of the definitions whose tasks this process runs. */
  readonly consuming: readonly string[]
  /** Why the engine cannot be reached, as the log has it. It may name hosts. */
  readonly error?: string
}

export const JOB_STATES: readonly JobState[] = ['pending', 'delayed', 'running', 'retrying', 'succeeded', 'failed', 'skipped', 'abandoned']
/** The most records of a page. */
export const MAX_LIMIT = 500
const MAX_TIMEOUT_MS = 60_000

const STATE: Rule = { accepts: `one of ${JOB_STATES.join(', ')}`, test: value => JOB_STATES.includes(value as JobState) }
const FIND_RULES: Rules = {
  state: STATE,
  limit: { accepts: `an integer from 1 to ${MAX_LIMIT}`, test: value => Number.isInteger(value) && (value as number) >= 1 && (value as number) <= MAX_LIMIT },
  after: { ...NAME, accepts: 'the "next" of another page' },
  payload: BOOLEAN
}
const TIMEOUT: Rule = { accepts: `milliseconds from 0 to ${MAX_TIMEOUT_MS}`, test: value => typeof value === 'number' && value >= 0 && value <= MAX_TIMEOUT_MS }
const RESULT_RULES: Rules = { timeout: TIMEOUT }

export async function count (intake: Intake, definition: AnyTaskDefinition): Promise<JobCounts> {
  const { jobs, dispatch } = intake
  checkDefinition(intake, 'count', definition)
  jobs.refuseUnless('count', definition)
  if (dispatch === undefined) return jobs.history.count(definition.name)
  return await dispatch.link.ask(async engine => await engine.count?.(definition.name) as JobCounts)
}

export async function find (intake: Intake, definition: AnyTaskDefinition, options: FindOptions): Promise<{ records: readonly JobRecord[], next?: string }> {
  const { jobs, dispatch } = intake
  checkDefinition(intake, 'find', definition)
  check('find', options, FIND_RULES)
  if (!STATE.test(options.state)) throw new FST_BGT_INVALID_OPTION(`The option "state" of find is required, and accepts ${STATE.accepts}`)
  const { state, limit = 50, after, payload = false } = options
  const position = after === undefined ? undefined : readCursor(after)
  jobs.refuseUnless('find', definition)
  // One record more tells whether there is another page.
  const query: JobQuery = { state, limit: limit + 1, after: position, payload }
  const found = dispatch === undefined
    ? jobs.history.query(definition.name, query)
    : await dispatch.link.ask(async engine => await engine.find?.(definition.name, query) ?? [])
  const records = found.slice(0, limit)
  const last = records.at(-1)
  return found.length > limit && last !== undefined ? { records, next: toCursor(last) } : { records }
}

export async function retry (intake: Intake, definition: AnyTaskDefinition, id: string): Promise<boolean> {
  const { jobs, dispatch } = intake
  checkLookup(intake, 'retry', definition, id)
  const local = jobs.find(definition.name, id)
  jobs.refuseUnless('retry', definition)
  if (dispatch === undefined || local !== undefined) return local !== undefined && retryHere(intake, local)
  return await dispatch.link.ask(async engine => await engine.retry?.(definition.name, id) === true)
}

export async function cancel (intake: Intake, definition: AnyTaskDefinition, id: string): Promise<boolean> {
  const { jobs, dispatch } = intake
  checkLookup(intake, 'cancel', definition, id)
  const local = jobs.find(definition.name, id)
  jobs.refuseUnless('cancel', definition)
  if (dispatch === undefined || local !== undefined) return local !== undefined && await cancelHere(local)
  return await dispatch.link.ask(async engine => await engine.cancel?.(definition.name, id) === true)
}

export async function result (intake: Intake, definition: AnyTaskDefinition, id: string, options: ResultOptions): Promise<JobRecord | undefined> {
  checkLookup(intake, 'result', definition, id)
  check('result', options, RESULT_RULES)
  const { timeout } = options
  if (!TIMEOUT.test(timeout)) throw new FST_BGT_INVALID_OPTION(`The option "timeout" of result is required, and accepts ${TIMEOUT.accepts}`)
  const endsAt = performance.now() + timeout
  const record = await read(intake, 'result', definition, id)
  if (record === undefined || hasEnded(record)) return record
  const left = endsAt - performance.now()
  // Some engines take other spellings of an id, and tell of the one that they have.
  return left > 0 ? await intake.resultWaits.wait(definition.name, record.id, left) : undefined
}

export function health ({ runner, jobs, dispatch, placement }: Intake): TaskHealth {
  const engine = placement === 'local' ? null : placement
  if (dispatch === undefined) return { engine, connected: true, consuming: runner.isClosed ? [] : jobs.definitions.map(({ name }) => name) }
  const { isConnected, consuming, lastError } = dispatch.link
  return { engine, connected: isConnected, consuming, ...!isConnected && { error: lastError } }
}

function retryHere (intake: Intake, task: DefinedTask): boolean {
  if (!task.hasFailedForGood) return false
  // No request has added it, although one may be served now.
  intake.addAlone(asPartOf(undefined, () => intake.jobs.remake(task)))
  return true
}

async function cancelHere (task: DefinedTask): Promise<boolean> {
  if (task.cancel()) return true
  // The task itself may have called this, and its function has to return first.
  await Promise.resolve()
  return task.cutOff(new FST_BGT_CANCELLED(task.name)) || task.cancelFailing()
}

function toCursor ({ enqueuedAt, id }: JobRecord): string {
  return Buffer.from(`${Date.parse(enqueuedAt)} ${id}`).toString('base64url')
}

/** @throws FST_BGT_INVALID_OPTION */
function readCursor (after: string): { enqueuedAt: number, id: string } {
  // Text that is no UTF-8 is read as U+FFFD.
  const [, time, id] = /^(-?\d{1,16}) ([^\uFFFD]+)$/u.exec(Buffer.from(after, 'base64url').toString()) ?? []
  if (id === undefined || timeOf(Number(time)) === undefined) throw new FST_BGT_INVALID_OPTION(`The option "after" of find accepts the "next" of another page; received ${show(after)}`)
  return { enqueuedAt: Number(time), id }
}
