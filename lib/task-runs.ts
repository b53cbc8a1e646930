import type { BackgroundTask } from './background-task.js'
import { publishRunEnd, runIsTraced, traceRun, type TaskRunMessage } from './diagnostics.js'
import { FST_BGT_TIMEOUT } from './errors.js'
import type { ExchangeOutcome } from './exchange.js'
import { bindingsOf, messageOf, type Ledger } from './ledger.js'
import { attempt, isThenable, limited } from './limits.js'
import type { ResolvedOptions } from './options.js'
import { toJobError, type TaskJob } from './task-job.js'
import type { TaskList } from './task-list.js'

/** One run of one task or cleanup: whether it runs, how long it may, and what is said when it fails. */
export class TaskRuns {
  readonly #options: ResolvedOptions
  readonly #ledger: Ledger
  /** Whether every run is watched: for its time, or for being slow. */
  readonly #watchesAll: boolean

  constructor (options: ResolvedOptions, ledger: Ledger) {
    this.#options = options
    this.#ledger = ledger
    this.#watchesAll = options.timeout !== undefined || options.slowTask !== undefined
  }

  /** @returns what has to be waited for before the list goes on: the task's promise, or that of an `onError` */
  run (list: TaskList, task: BackgroundTask, isCleanup = false): PromiseLike<unknown> | undefined {
    list.cleaning = isCleanup
    try {
      if (isCleanup) {
        task.begin()
      } else {
        const reason = this.reasonToSkip(list, task, list.exchange?.outcome)
        if (reason !== undefined) {
          this.#ledger.skipped(list, task, reason)
          return undefined
        }
        const job = task.options?.job
        if (job !== undefined && !this.#mayStart(list, task, job)) return undefined
        this.#ledger.started(task)
        job?.started()
      }
      list.current = task
      const result = this.#watchesAll || task.options !== undefined || runIsTraced() ? this.#watch(list, task) : task.start()
      if (isThenable(result)) return result
      this.succeeded(list, task, result)
      return undefined
    } catch (error) {
      return this.failed(list, task, error)
    }
  }

  succeeded (list: TaskList, task: BackgroundTask, result: unknown): void {
    list.current = undefined
    endTrace(list, { result })
    if (list.cleaning) {
      task.end('succeeded')
    } else {
      task.options?.job?.succeeded(result)
      this.#ledger.succeeded(list, task)
    }
  }

  failed (list: TaskList, task: BackgroundTask, error: unknown): Promise<void> | undefined {
    list.current = undefined
    endTrace(list, { error })
    // A cleanup has no options.
    const job = task.options?.job
    const retryMs = job?.retryMs(error)
    if (job !== undefined && retryMs !== undefined) {
      this.#retry(list, task, job, error, retryMs)
      return undefined
    }
    if (this.#options.stopOnError && !list.cleaning) list.stopped = true
    const lastWord = job?.lastWord(error)
    const context = list.cleaning ? task.end('failed') : this.#ledger.failed(list, task, error)
    const reported = context.runInAsyncScope(() => this.#report(list, task, error, lastWord))
    return job === undefined ? reported : settleBehind(reported, job, error)
  }

  /** A task that no engine has taken. */
  notStored (list: TaskList, task: BackgroundTask, error: unknown): void {
    const context = this.#ledger.failed(list, task, error)
    void context.runInAsyncScope(() => this.#report(list, task, error))
  }

  /** A task that the drain has cut off ended after all. */
  late (list: TaskList, task: BackgroundTask | undefined): void {
    if (task === undefined) return
    attempt(() => { list.log.debug({ task: bindingsOf(task) }, 'background task ended after it was cut off') })
  }

  /** At the deadline of the drain: the cleanup is started and not waited for. */
  cleanUp (list: TaskList, cleanup: BackgroundTask): void {
    const failed = (error: unknown): void => { void this.#report(list, cleanup, error) }
    try {
      const result = cleanup.start()
      if (isThenable(result)) result.then(undefined, failed)
    } catch (error) {
      failed(error)
    }
    cleanup.end('abandoned')
  }

  /** The drain has cut off the task that runs. */
  cutOff (list: TaskList, reason: unknown): void {
    endTrace(list, { error: reason })
  }

  /** Why a task does not run for this outcome, or undefined if it does. Throws what its `when` throws. */
  reasonToSkip (list: TaskList, task: BackgroundTask, outcome: ExchangeOutcome | undefined): string | undefined {
    if (list.stopped) return 'a task before it failed, and stopOnError is set'
    if (outcome === undefined) return undefined
    const when = task.options?.when ?? this.#options.when
    if (when === 'always') return undefined
    if (when === 'success') return outcome.failed ? 'the exchange failed, and its `when` is \'success\'' : undefined
    if (when === 'error') return outcome.failed ? undefined : 'the exchange did not fail, and its `when` is \'error\''
    return when(outcome) ? undefined : 'its `when` returned false'
  }

  /** Whether a task of a definition starts now: its time may not have come, or another one of its key was first. */
  #mayStart (list: TaskList, task: BackgroundTask, job: TaskJob): boolean {
    const waitMs = job.waitMs()
    if (waitMs > 0) {
      list.later(task, waitMs)
      return false
    }
    if (job.attempt > 0 || job.origin.key === undefined || list.runner.jobs.history.claim(task)) return true
    this.#ledger.skipped(list, task, 'another task of its key was first')
    return false
  }

  #retry (list: TaskList, task: BackgroundTask, job: TaskJob, err: unknown, delayMs: number): void {
    attempt(() => {
      list.log.warn({ err, task: bindingsOf(task), delayMs }, `background task attempt failed: the next one is in ${delayMs} ms`)
    })
    if (job.origin.delivery !== undefined) {
      this.#ledger.released(list, task)
      job.settle({ kind: 'retry', error: toJobError(err), delayMs })
      return
    }
    job.dueAt = Date.now() + delayMs
    this.#ledger.retried(task)
    list.later(task, delayMs)
  }

  /** Starts a task, with an eye on its time if it has limits. */
  #watch (list: TaskList, task: BackgroundTask): unknown {
    const { slowTask: slow } = this.#options
    const timeout = task.options?.timeout ?? this.#options.timeout
    const traced = runIsTraced() && !list.cleaning
    if (!traced && timeout === undefined && slow === undefined) return task.start()

    const startedAt = performance.now()
    const result = traced ? this.#trace(list, task, startedAt) : task.start()
    const tookMs = performance.now() - startedAt
    const warn = (text: string): void => { attempt(() => { list.log.warn({ task: bindingsOf(task) }, text) }) }
    const isSlow = (): void => { warn(`background task is slow: it has been running for more than ${String(slow)} ms`) }
    if (!isThenable(result)) {
      if (timeout !== undefined && tookMs > timeout) {
        warn(`background task outlasted its timeout of ${timeout} ms: a synchronous function cannot be interrupted`)
      } else if (slow !== undefined && tookMs > slow) {
        isSlow()
      }
      return result
    }
    return limited(result, {
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
  }

  #trace (list: TaskList, task: BackgroundTask, startedAt: number): unknown {
    const job = task.options?.job
    const message: TaskRunMessage = {
      ...messageOf(list, task),
      queuedMs: startedAt - task.addedAt,
      ...job !== undefined && { attempt: job.attempt, headers: job.origin.headers }
    }
    const result = task.start(call => traceRun(message, call))
    if (isThenable(result)) list.trace = message
    return result
  }

  /** One log line, then `onError`, then the definition's `onFailed`; none of them can stop the list. */
  #report (list: TaskList, task: BackgroundTask, error: unknown, lastWord?: () => unknown): Promise<void> | undefined {
    attempt(() => { list.log.error({ err: error, task: bindingsOf(task) }, 'background task failed') })
    const { onError } = this.#options
    const told = onError === undefined
      ? undefined
      : this.#tell(list, task, 'onError', () => onError(error, task, list.request))
    if (lastWord === undefined) return told
    const tellLast = (): Promise<void> | undefined => this.#tell(list, task, 'onFailed', lastWord)
    return told === undefined ? tellLast() : told.then(tellLast)
  }

  #tell (list: TaskList, task: BackgroundTask, what: string, call: () => unknown): Promise<void> | undefined {
    const failed = (err: unknown): void => {
      attempt(() => { list.log.error({ err, task: bindingsOf(task) }, `${what} of a background task failed`) })
    }
    try {
      const result = call()
      return isThenable(result) ? Promise.resolve(result).then(() => {}, failed) : undefined
    } catch (err) {
      failed(err)
      return undefined
    }
  }
}

/** An engine is told of a failure when `onFailed` was: should the process die before, both happen again. */
function settleBehind (reported: Promise<void> | undefined, job: TaskJob, error: unknown): Promise<void> | undefined {
  const settle = (): void => { job.settle({ kind: 'failed', error: toJobError(error) }) }
  if (reported !== undefined) return reported.then(settle)
  settle()
  return undefined
}

/** The trace of a task that was waited for ends with it. */
function endTrace (list: TaskList, end: { result: unknown } | { error: unknown }): void {
  if (list.trace === undefined) return
  publishRunEnd(Object.assign(list.trace, end))
  list.trace = undefined
}
