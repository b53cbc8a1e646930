import type { BackgroundTask } from '../tasks/background-task.js'
import { publishRunEnd, runIsTraced, traceRun, type TaskRunMessage } from '../tasks/diagnostics.js'
import { FST_BGT_TIMEOUT } from '../errors.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import { attempt, isThenable, promiseOf } from '../foreign.js'
import { bindingsOf, messageOf, type Ledger } from './ledger.js'
import { Limited } from '../limits.js'
import type { ResolvedOptions, RunOptions, TaskCondition } from '../options.js'
import { toJobError, type TaskJob } from '../definitions/defined-task.js'
import { insideCleanup, type TaskList } from '../tasks/task-list.js'

/** One run of one task or cleanup: whether it runs, how long it may, and what is said when it fails. */
export class TaskRuns {
  readonly #options: ResolvedOptions
  readonly #ledger: Ledger
  readonly #when: TaskCondition
  /** Whether every run is watched: for its time, or for being slow. */
  readonly #watchesAll: boolean

  constructor (options: ResolvedOptions, ledger: Ledger) {
    this.#options = options
    this.#ledger = ledger
    this.#when = options.when ?? 'success'
    this.#watchesAll = options.timeout !== undefined || options.slowTask !== undefined
  }

  /** @returns what has to be waited for before the list goes on: the task's promise, or that of an `onError` */
  run (list: TaskList, task: BackgroundTask, isCleanup = false): Promise<unknown> | undefined {
    list.cleaning = isCleanup
    let result: unknown
    let promise: Promise<unknown> | undefined
    try {
      if (isCleanup) {
        task.begin()
      } else {
        const reason = this.#reasonToSkip(list, task, list.exchange?.outcome)
        if (reason !== undefined) return this.#skip(list, task, reason)
        if (task.options?.job !== undefined && !this.#mayStart(list, task, task.options.job)) return undefined
        this.#ledger.started(task)
        task.options?.job?.started()
      }
      list.current = task
      // After the drain a cleanup must not add itself again.
      result = isCleanup && list.runner.closed ? task.start(call => insideCleanup.run(list, call)) : this.#watchesAll || task.options !== undefined || runIsTraced() ? this.#watch(list, task) : task.start()
      promise = task.promiseOf(result)
    } catch (error) {
      return this.failed(list, task, error)
    }
    if (promise !== undefined) return promise
    this.succeeded(list, task, result)
    return undefined
  }

  succeeded (list: TaskList, task: BackgroundTask, result: unknown): void {
    list.current = undefined
    if (list.limit !== undefined) list.limit = undefined
    if (list.cleaning) {
      task.end('succeeded')
    } else {
      task.options?.job?.succeeded(result)
      this.#ledger.succeeded(list, task)
    }
    if (list.trace !== undefined) endTrace(list, { result })
  }

  failed (list: TaskList, task: BackgroundTask, error: unknown): Promise<void> | undefined {
    // Its `when` has cancelled it, and has thrown then.
    if (task.state === 'skipped') return undefined
    list.current = undefined
    list.limit = undefined
    if (list.trace !== undefined) endTrace(list, { error })
    // A cleanup has no options. What has not started was no attempt: its `when` threw.
    const job = task.options?.job
    const next = job === undefined ? { error } : task.state === 'running' ? job.afterFailure(error) : job.neverStarted(error)
    if (job !== undefined && 'delayMs' in next) {
      this.#retry(list, task, job, error, next.delayMs)
      return undefined
    }
    // Without a job there is no delay.
    const { error: reason } = next as { error: unknown }
    if (this.#options.stopOnError && !list.cleaning) list.stopped = true
    const lastWord = task.state === 'running' ? job?.lastWord(reason) : undefined
    const timeout = this.#timeoutOf(task)
    const context = list.cleaning ? task.end('failed') : this.#ledger.failed(list, task, reason)
    const reported = context.runInAsyncScope(() => this.#report(list, task, reason, timeout, lastWord))
    return job === undefined ? reported : settleBehind(reported, job, reason)
  }

  /** A task that no engine has taken. */
  notStored (list: TaskList, task: BackgroundTask, error: unknown): void {
    task.options?.job?.neverStarted(error)
    const context = this.#ledger.failed(list, task, error)
    void context.runInAsyncScope(() => this.#report(list, task, error, undefined))
  }

  /** A task that the drain has cut off ended after all. */
  late (list: TaskList, task: BackgroundTask | undefined): void {
    if (task === undefined) return
    attempt(() => { list.log.debug({ task: bindingsOf(task) }, 'background task ended after it was cut off') })
  }

  /** At the deadline of the drain: the cleanup is started and not waited for. */
  cleanUp (list: TaskList, cleanup: BackgroundTask): void {
    const failed = (error: unknown): void => { void this.#report(list, cleanup, error, undefined) }
    try {
      cleanup.promiseOf(cleanup.start(call => insideCleanup.run(list, call)))?.catch(failed)
    } catch (error) {
      failed(error)
    }
    cleanup.end('abandoned')
  }

  /** The drain has cut off the task that runs. */
  cutOff (list: TaskList, reason: unknown): void {
    if (list.trace !== undefined) endTrace(list, { error: reason })
  }

  /** Whether the task runs for this outcome. If not, it has been skipped, or its `when` has failed. */
  isWanted (list: TaskList, task: BackgroundTask, outcome: ExchangeOutcome | undefined): boolean {
    try {
      const reason = this.#reasonToSkip(list, task, outcome)
      if (reason === undefined) return true
      this.#skip(list, task, reason)
    } catch (error) {
      // Another task of the list may be running: nothing of the list is touched.
      if (task.state === 'pending') this.notStored(list, task, error)
    }
    return false
  }

  /** Why a task does not run for this outcome, or undefined if it does. Throws what its `when` throws. */
  #reasonToSkip (list: TaskList, task: BackgroundTask, outcome: ExchangeOutcome | undefined): string | undefined {
    if (list.stopped) return 'a task before it failed, and stopOnError is set'
    if (outcome === undefined) return undefined
    const { options } = task
    const when = options === undefined ? this.#when : this.#whenOf(options)
    if (when === 'always') return undefined
    if (when === 'success') return outcome.failed ? 'the exchange failed, and its `when` is \'success\'' : undefined
    if (when === 'error') return outcome.failed ? undefined : 'the exchange did not fail, and its `when` is \'error\''
    const answer: unknown = when(outcome)
    if (isThenable(answer)) throw new Error(`the \`when\` of the background task "${task.name}" returned a promise: it is asked synchronously`)
    if (task.state !== 'pending') return 'its `when` cancelled it'
    return answer ? undefined : 'its `when` returned false'
  }

  /** What was added for a failure runs by default, and the nearest `when` decides. */
  #whenOf ({ when, isForFailure }: RunOptions): TaskCondition {
    return when ?? (isForFailure === true && this.#options.when === undefined ? 'always' : this.#when)
  }

  #skip (list: TaskList, task: BackgroundTask, reason: string): undefined {
    // What was cancelled has been counted.
    if (task.state === 'pending') this.#ledger.skipped(list, task, reason)
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
    job.dueAt = performance.now() + delayMs
    this.#ledger.retried(task)
    list.later(task, delayMs)
  }

  #timeoutOf (task: BackgroundTask): number | undefined {
    return task.options?.timeout ?? this.#options.timeout
  }

  /** Starts a task, with an eye on its time if it has limits. */
  #watch (list: TaskList, task: BackgroundTask): unknown {
    const { slowTask: slow } = this.#options
    const timeout = this.#timeoutOf(task)
    const traced = runIsTraced() && !list.cleaning
    if (!traced && timeout === undefined && slow === undefined) return task.start()

    const startedAt = performance.now()
    const result = traced ? this.#trace(list, task, startedAt) : task.start()
    const promise = task.promiseOf(result)
    const tookMs = performance.now() - startedAt
    const warn = (text: string): void => { attempt(() => { list.log.warn({ task: bindingsOf(task) }, text) }) }
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
    list.limit = limited
    return limited.promise
  }

  #trace (list: TaskList, task: BackgroundTask, startedAt: number): unknown {
    const job = task.options?.job
    const message: TaskRunMessage = {
      ...messageOf(list, task),
      queuedMs: startedAt - task.addedAt,
      ...job !== undefined && { attempt: job.attempt, headers: job.origin.headers }
    }
    const result = task.start(call => traceRun(message, () => {
      const result = call()
      const promise = task.promiseOf(result)
      if (promise !== undefined) list.trace = message
      return promise ?? result
    }))
    return result
  }

  /** One log line, then `onError`, then the definition's `onFailed`, each as long as the task might have taken; none of them can stop the list. */
  #report (list: TaskList, task: BackgroundTask, error: unknown, timeout: number | undefined, lastWord?: () => unknown): Promise<void> | undefined {
    attempt(() => { list.log.error({ err: error, task: bindingsOf(task) }, 'background task failed') })
    const { onError } = this.#options
    const told = onError === undefined
      ? undefined
      : this.#tell(list, task, 'onError', timeout, () => onError(error, task, list.request))
    if (lastWord === undefined) return told
    const tellLast = (): Promise<void> | undefined => this.#tell(list, task, 'onFailed', timeout, lastWord)
    return told === undefined ? tellLast() : told.then(tellLast)
  }

  /** @param timeout milliseconds for which the list waits */
  #tell (list: TaskList, task: BackgroundTask, what: string, timeout: number | undefined, call: () => unknown): Promise<void> | undefined {
    const failed = (err: unknown): void => {
      attempt(() => { list.log.error({ err, task: bindingsOf(task) }, `${what} of a background task failed`) })
    }
    try {
      const told = promiseOf(call())
      if (told === undefined) return undefined
      const noted = told.then(() => {}, failed)
      if (timeout === undefined) return noted
      const limited = new Limited(noted, {
        timeout,
        onTimeout: () => new Error(`${what} did not finish within the task's timeout of ${timeout} ms`)
      })
      list.limit = limited
      return limited.promise.then(() => {}, failed)
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
  const { trace } = list
  list.trace = undefined
  // Who asks knows that there is one.
  publishRunEnd(Object.assign(trace as TaskRunMessage, end))
}
