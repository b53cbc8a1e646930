import { asDefined, type DefinedTask } from '../definitions/defined-task.js'
import { toJobError } from '../definitions/job-error.js'
import { FST_BGT_TIMEOUT } from '../errors.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import { attempt } from '../foreign.js'
import { Limited } from '../limits.js'
import type { BackgroundTask } from '../tasks/background-task.js'
import { publishRunEnd, runIsTraced, traceRun, type TaskRunMessage } from '../tasks/diagnostics.js'
import type { TaskList } from '../tasks/task-list.js'
import type { Conditions } from './conditions.js'
import { startLateCleanup } from './late-cleanups.js'
import { messageOf, type Ledger } from './ledger.js'
import { Reports } from './reports.js'
import type { RunnerOptions } from './runner-options.js'

/** Makes a task of a list start after so many milliseconds. */
type Delay = (list: TaskList, task: DefinedTask, ms: number) => void

/** One attempt of one task or cleanup: whether it starts, how long it may take, and what follows when it fails. */
export class TaskRuns {
  readonly #options: RunnerOptions
  readonly #ledger: Ledger
  readonly #delay: Delay
  readonly #conditions: Conditions
  readonly #reports: Reports
  /** Whether every task is watched, because `timeout` or `slowTask` is set. */
  readonly #watchesAll: boolean
  #afterDrain = false

  constructor (options: RunnerOptions, ledger: Ledger, conditions: Conditions, delay: Delay) {
    this.#options = options
    this.#ledger = ledger
    this.#delay = delay
    this.#conditions = conditions
    this.#reports = new Reports(options.onError)
    this.#watchesAll = options.timeout !== undefined || options.slowTask !== undefined
  }

  /** The drain is over. */
  close (): void {
    this.#afterDrain = true
  }

  /**
   * Runs one attempt of a task.
   * @returns what has to be waited for before the list goes on: the promise of the task, or of an `onError`
   */
  run (list: TaskList, task: BackgroundTask): Promise<unknown> | undefined {
    list.prepare(false)
    let result: unknown
    let promise: Promise<unknown> | undefined
    try {
      const reason = this.#conditions.reasonToSkip(list, task, list.exchange?.outcome)
      if (reason !== undefined) return this.#skip(list, task, reason)
      if (task.options !== undefined && !this.#mayStart(list, task)) return undefined
      this.#ledger.started(task)
      list.startTask(task)
      result = this.#watchesAll || task.options !== undefined || runIsTraced() ? this.#watch(list, task) : task.start()
      promise = task.promiseOf(result)
    } catch (error) {
      return this.failed(list, task, error)
    }
    // The end is noted outside the `try`, because an error of this package is not the task's.
    if (promise !== undefined) return promise
    this.succeeded(list, task, result)
    return undefined
  }

  /**
   * Runs a cleanup.
   * @returns what has to be waited for before the list goes on
   */
  runCleanup (list: TaskList, cleanup: BackgroundTask): Promise<unknown> | undefined {
    list.prepare(true)
    let promise: Promise<unknown> | undefined
    try {
      cleanup.begin()
      list.startTask(cleanup)
      const result = this.#afterDrain ? startLateCleanup(list, cleanup) : this.#watchesAll ? this.#watch(list, cleanup) : cleanup.start()
      promise = cleanup.promiseOf(result)
    } catch (error) {
      return this.failed(list, cleanup, error)
    }
    if (promise !== undefined) return promise
    this.succeeded(list, cleanup, undefined)
    return undefined
  }

  /** Starts a cleanup at the deadline of the drain, and does not wait for it. */
  startCleanup (list: TaskList, cleanup: BackgroundTask): void {
    const failed = (error: unknown): void => { void this.#reports.failed(list, cleanup, error, undefined) }
    try {
      cleanup.promiseOf(startLateCleanup(list, cleanup))?.catch(failed)
    } catch (error) {
      failed(error)
    }
    cleanup.end('abandoned')
  }

  succeeded (list: TaskList, task: BackgroundTask, result: unknown): void {
    list.doneWithTask()
    if (list.isCleaning) {
      task.end('succeeded')
    } else {
      if (task.options !== undefined) asDefined(task)?.succeeded(result)
      this.#ledger.succeeded(list, task)
    }
    endTrace(list, 'result', result)
  }

  failed (list: TaskList, task: BackgroundTask, error: unknown): Promise<void> | undefined {
    // The task's `when` has cancelled the task, and then thrown.
    if (task.state === 'skipped') return undefined
    list.doneWithTask()
    endTrace(list, 'error', error)
    const defined = asDefined(task)
    // A task that has not started had no attempt: its `when` threw.
    const next = defined === undefined ? { error } : task.state === 'running' ? defined.afterFailure(error) : defined.neverStarted(error)
    if (defined !== undefined && 'delayMs' in next) {
      this.#retry(list, defined, error, next.delayMs)
      return undefined
    }
    // Only a task of a definition has a delay before another attempt, and that case has returned.
    const { error: reason } = next as { error: unknown }
    if (this.#options.stopOnError && !list.isCleaning) list.stop()
    const onFailed = task.state === 'running' ? defined?.onFailedCall(reason) : undefined
    const timeout = this.#timeoutOf(task)
    const context = list.isCleaning ? task.end('failed') : this.#ledger.failed(list, task, reason)
    const reported = context.runInAsyncScope(() => this.#reports.failed(list, task, reason, timeout, onFailed))
    return defined === undefined ? reported : settleAfter(reported, defined, reason)
  }

  /** No engine has stored the task. */
  notStored (list: TaskList, task: BackgroundTask, error: unknown): void {
    asDefined(task)?.neverStarted(error)
    const context = this.#ledger.failed(list, task, error)
    void context.runInAsyncScope(() => this.#reports.failed(list, task, error, undefined))
  }

  /** A task has ended after the drain, or its timeout, had cut it off. */
  late (list: TaskList, task: BackgroundTask | undefined): void {
    if (task === undefined) return
    attempt(() => { list.log.debug({ task: task.toBindings() }, 'background task ended after it was cut off') })
  }

  /** The task that runs was cut off, by the drain or because somebody has cancelled it. */
  cutOff (list: TaskList, reason: unknown): void {
    endTrace(list, 'error', reason)
  }

  /** Skips the task unless its `when` wants it for this outcome. @returns whether it is wanted */
  skipUnlessWanted (list: TaskList, task: BackgroundTask, outcome: ExchangeOutcome | undefined): boolean {
    try {
      const reason = this.#conditions.reasonToSkip(list, task, outcome)
      if (reason === undefined) return true
      this.#skip(list, task, reason)
    } catch (error) {
      // Another task of the list may be running, so the state of the list is not touched.
      if (task.state === 'pending') this.notStored(list, task, error)
    }
    return false
  }

  #skip (list: TaskList, task: BackgroundTask, reason: string): undefined {
    // A task that was cancelled has been counted already.
    if (task.state === 'pending') this.#ledger.skipped(list, task, reason)
  }

  /** Whether the task starts now. A task of a definition may have to wait for its time, and is skipped if another one of its key was first. */
  #mayStart (list: TaskList, task: BackgroundTask): boolean {
    const defined = asDefined(task)
    if (defined === undefined) return true
    const { waitMs } = defined
    if (waitMs > 0) {
      this.#delay(list, defined, waitMs)
      return false
    }
    if (defined.claim()) return true
    this.#ledger.skipped(list, task, 'another task of its key was first')
    return false
  }

  #retry (list: TaskList, task: DefinedTask, err: unknown, delayMs: number): void {
    attempt(() => {
      list.log.warn({ err, task: task.toBindings(), delayMs }, `background task attempt failed: the next one is in ${delayMs} ms`)
    })
    if (task.envelope.delivery !== undefined) {
      this.#ledger.returned(list, task)
      task.settle({ kind: 'retry', error: toJobError(err), delayMs })
      return
    }
    task.dueAt = performance.now() + delayMs
    this.#ledger.retried(task)
    this.#delay(list, task, delayMs)
  }

  #timeoutOf (task: BackgroundTask): number | undefined {
    return task.options?.timeout ?? this.#options.timeout
  }

  /** Starts a task, and watches its time if it has limits. */
  #watch (list: TaskList, task: BackgroundTask): unknown {
    const { slowTask: slow } = this.#options
    const timeout = this.#timeoutOf(task)
    const traced = runIsTraced() && !list.isCleaning
    if (!traced && timeout === undefined && slow === undefined) return task.start()

    const startedAt = performance.now()
    const result = traced ? this.#trace(list, task, startedAt) : task.start()
    const promise = task.promiseOf(result)
    const tookMs = performance.now() - startedAt
    const warn = (text: string): void => { attempt(() => { list.log.warn({ task: task.toBindings() }, text) }) }
    const isSlow = (): void => { warn(`background task is slow: it has been running for more than ${String(slow)} ms`) }
    if (promise === undefined) {
      if (timeout !== undefined && tookMs > timeout) {
        warn(`background task outlasted its timeout of ${timeout} ms: a synchronous function cannot be interrupted`)
      } else if (slow !== undefined && tookMs > slow) {
        isSlow()
      }
      return result
    }
    if (timeout === undefined && slow === undefined) return promise
    const limited = new Limited(promise, {
      timeout: timeout && Math.max(timeout - tookMs, 0),
      slow: slow && Math.max(slow - tookMs, 0),
      onTimeout: () => {
        const error = new FST_BGT_TIMEOUT(task.name, timeout)
        task.abort(error)
        return error
      },
      onSlow: isSlow,
      onLate: () => { this.late(list, task) }
    })
    list.watchWith(limited)
    return limited.promise
  }

  #trace (list: TaskList, task: BackgroundTask, startedAt: number): unknown {
    const defined = asDefined(task)
    const message: TaskRunMessage = {
      ...messageOf(list, task),
      queuedMs: startedAt - task.addedAt,
      ...defined !== undefined && { attempt: defined.attempt, headers: defined.envelope.headers }
    }
    return task.start(call => traceRun(message, () => {
      const result = call()
      const promise = task.promiseOf(result)
      if (promise !== undefined) list.traceWith(message)
      return promise ?? result
    }))
  }
}

/**
 * Tells an engine of a failure when `onFailed` has ended. If the process dies before that, another process calls `onFailed` again, and
 * tells the engine.
 */
function settleAfter (reported: Promise<void> | undefined, task: DefinedTask, error: unknown): Promise<void> | undefined {
  const settle = (): void => { task.settle({ kind: 'failed', error: toJobError(error) }) }
  if (reported !== undefined) return reported.then(settle)
  settle()
  return undefined
}

/** Ends the trace of a task that was waited for. */
function endTrace (list: TaskList, key: 'result' | 'error', value: unknown): void {
  const trace = list.takeTrace()
  if (trace === undefined) return
  trace[key] = value
  publishRunEnd(trace)
}
