import { EventEmitter } from 'node:events'
import { asDefined } from './definitions/defined-task.js'
import type { EngineLink } from './dispatch/engine-link.js'
import { attempt } from './foreign.js'
import type { CutOff, Runner } from './runner/runner.js'
import type { TaskList } from './tasks/task-list.js'

/** The most milliseconds that a timer of Node takes. After that the drain looks again. */
const MAX_WAIT_MS = 2 ** 31 - 1

/** One listener on the process for all apps that are closing, because Node warns of the eleventh. */
const exits = new EventEmitter().setMaxListeners(0)
const onBeforeExit = (): void => { exits.emit('beforeExit') }
exits.on('newListener', () => { if (exits.listenerCount('beforeExit') === 0) process.on('beforeExit', onBeforeExit) })
exits.on('removeListener', () => { if (exits.listenerCount('beforeExit') === 0) process.removeListener('beforeExit', onBeforeExit) })

/** What the drain needs to know of the app that closes. */
export interface Drained {
  readonly runner: Runner
  /** Milliseconds until the deadline. */
  readonly closeTimeout: number
  /** The link to the engine, if there is one. */
  readonly link: EngineLink | undefined
  /** Skips the tasks that a test has recorded. */
  readonly dropRecorded: () => void
}

/**
 * The drain: finishes the tasks that are left when an app closes. Resolves when nothing is left and the engine has stopped, and never
 * rejects. At the deadline, `closeTimeout` milliseconds from now, the tasks that are left are cut off. If after half of that time all that
 * is left are aborted exchanges whose handlers have not settled, the drain stops waiting for those handlers, and runs their tasks.
 */
export async function drain ({ runner, closeTimeout, link, dropRecorded }: Drained): Promise<void> {
  const startedAt = performance.now()
  let exiting = false
  // A test has recorded these tasks, so nobody waits for them.
  dropRecorded()
  // This is not awaited, so that it takes nothing of the time until the deadline.
  void link?.pause()
  if (runner.open.size > 0) sayWhatIsWaitedFor(runner)
  while (runner.open.size > 0) {
    const elapsed = performance.now() - startedAt
    const unsettledMs = closeTimeout / 2 - elapsed
    const onlyUnsettled = isOnlyUnsettled(runner.open)
    if (elapsed >= closeTimeout) {
      abandon(runner, 'because closeTimeout has passed')
    } else if (exiting || (onlyUnsettled && unsettledMs <= 0)) {
      if (!endUnsettled(runner.open)) abandon(runner, 'because nothing in the process can settle them any more')
      exiting = false
    } else if (isResting(runner.open, startedAt + closeTimeout)) {
      abandon(runner, 'because their time comes after closeTimeout')
    } else {
      exiting = await nextListDone(runner, onlyUnsettled ? unsettledMs : closeTimeout - elapsed)
    }
  }
  runner.close()
  await link?.stop()
}

/**
 * Resolves when a list is done or the time is up. Resolves to true when the process is about to exit. The timer of the deadline does not
 * keep the process alive, so a process in which nothing else happens would exit without a log line about its tasks.
 */
async function nextListDone (runner: Runner, ms: number): Promise<boolean> {
  return await new Promise(resolve => {
    const timer = setTimeout(done, Math.min(ms, MAX_WAIT_MS), false).unref()
    const exit = (): void => { done(true) }
    function done (exiting: boolean): void {
      clearTimeout(timer)
      exits.removeListener('beforeExit', exit)
      resolve(exiting)
    }
    exits.once('beforeExit', exit)
    runner.onListDone(() => { done(false) })
  })
}

function sayWhatIsWaitedFor (runner: Runner): void {
  // A task may be named like a property that every object has, for example `constructor`.
  const counts: Record<string, number> = Object.create(null)
  for (const list of runner.open) {
    for (const { name } of list.tasks()) counts[name] = (counts[name] ?? 0) + 1
  }
  attempt(() => { runner.log.info({ tasks: counts }, 'waiting for background tasks') })
}

function isOnlyUnsettled (lists: Iterable<TaskList>): boolean {
  for (const list of lists) if (list.phase !== 'waiting') return false
  return true
}

/** Whether all that is left are tasks whose time comes after the deadline. */
function isResting (lists: Iterable<TaskList>, deadline: number): boolean {
  for (const list of lists) if ((list.restsUntil ?? 0) <= deadline) return false
  return true
}

/**
 * Ends the exchanges that have not settled.
 * @returns whether there were any
 */
function endUnsettled (lists: Iterable<TaskList>): boolean {
  const unsettled = [...lists].filter(list => list.phase === 'waiting')
  for (const list of unsettled) list.exchange?.force()
  return unsettled.length > 0
}

/** A hint for the log: a reason why a running task may never end. */
const WAITS_FOR_ITSELF = ' (a task that awaits app.close() or idle() waits for itself)'

function abandon (runner: Runner, why: string): void {
  const hint = runner.stats.running > 0 ? WAITS_FOR_ITSELF : ''
  const cutOff = runner.abandonAll()
  const abandoned = cutOff.filter(({ task }) => task.state === 'abandoned')
  const returned = cutOff.filter(({ task }) => task.state !== 'abandoned')
  if (abandoned.length > 0) sayWhatIsCutOff(abandoned, (tasks, names) => { runner.log.error({ tasks }, `background tasks abandoned, ${why}${hint}: ${names}`) })
  if (returned.length > 0) sayWhatIsCutOff(returned, (tasks, names) => { runner.log.info({ tasks }, `background tasks returned to their engine, ${why}: ${names}`) })
}

function sayWhatIsCutOff (cutOff: readonly CutOff[], say: (tasks: object[], names: string) => void): void {
  const now = performance.now()
  attempt(() => {
    const tasks = cutOff.map(({ list, task }) => ({
      ...task.toBindings(), requestId: list.request?.id ?? asDefined(task)?.envelope.requestId, ageMs: Math.round(now - task.addedAt)
    }))
    say(tasks, cutOff.map(({ task }) => task.name).join(', '))
  })
}
