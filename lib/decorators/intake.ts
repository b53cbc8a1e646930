import type { FastifyRequest } from 'fastify'
import { TaskDefinition, type AnyTaskDefinition } from '../definitions/define-task.js'
import type { DefinedTask } from '../definitions/defined-task.js'
import type { JobOptions, Jobs } from '../definitions/jobs.js'
import type { Dispatch } from '../dispatch/dispatch.js'
import type { JobRecord } from '../engines/engine.js'
import { ResultWaits } from '../dispatch/result-waits.js'
import { asPartOf } from '../current-request.js'
import { attempt, isFunction, isInstance, promiseOf } from '../foreign.js'
import { isInLateCleanup } from '../runner/late-cleanups.js'
import type { Runner } from '../runner/runner.js'
import { BackgroundTask, invalidTask } from '../tasks/background-task.js'
import type { TaskFunction } from '../tasks/task-function.js'
import { TaskList } from '../tasks/task-list.js'
import type { AddedOptions, TaskOptions } from '../tasks/task-options.js'

/** The tasks of a request, which know what its reply promises. */
export interface ReplyPromises {
  /**
   * Lets the reply promise the task.
   * @param dispatch the way to the engine that is to store the task; undefined if the task runs here
   * @returns whether the task is stored together with the reply, and not now
   */
  promise: (task: DefinedTask, dispatch: Dispatch | undefined) => boolean
}

/** A test's recorder, which is told of each added task and keeps it from running. */
export interface AddListener {
  /** The task is about to be put on the list. */
  taskAdded: (intake: Intake, list: TaskList, task: BackgroundTask) => void
  /** Skips the recorded tasks. */
  drop: () => void
  /** Detaches the recorder, because another one takes its place. */
  detach: () => void
}

/** The platform's `waitUntil`. */
export type WaitUntil = (promise: Promise<void>) => void

/** What `addTask` and `addCleanup` do: make the task, put it on its list, and hand it on to the runner or to the engine. */
export class Intake {
  readonly runner: Runner
  readonly jobs: Jobs
  /** The way to the engine. Undefined without an engine. */
  readonly #dispatch: Dispatch | undefined
  readonly #waitUntil: WaitUntil | undefined
  /** Whether what is added is part of the request of its list, and not of the request that is being served. */
  readonly #isAmbient: boolean
  /** The waits for results. */
  readonly resultWaits: ResultWaits
  /** The recorder, while a test records. */
  recorder: AddListener | undefined

  constructor (runner: Runner, jobs: Jobs, dispatch: Dispatch | undefined, waitUntil: WaitUntil | undefined, isAmbient: boolean) {
    this.runner = runner
    this.jobs = jobs
    this.#dispatch = dispatch
    this.#waitUntil = waitUntil
    this.#isAmbient = isAmbient
    this.resultWaits = new ResultWaits({
      read: async (name, id) => await this.read(name, id),
      watch: (name, onEnd) => this.dispatch === undefined ? this.jobs.history.watch(name, onEnd) : this.dispatch.link.engine.watch?.(name, onEnd)
    })
  }

  /** The way to the engine. Undefined without an engine, and while a test records. */
  get dispatch (): Dispatch | undefined {
    return this.recorder === undefined ? this.#dispatch : undefined
  }

  /** Where tasks of definitions run: the name of the engine, or `'local'`. */
  get placement (): string {
    return this.#dispatch?.link.engine.name ?? 'local'
  }

  /** Reads a record: of this process, or else of the engine. */
  async read (name: string, id: string, payload = false): Promise<JobRecord | undefined> {
    const local = this.jobs.find(name, id)?.toRecord(payload)
    if (local !== undefined || this.dispatch === undefined) return local
    return await this.dispatch.link.ask(engine => engine.get(name, id, { payload }))
  }

  listFor (request: FastifyRequest | undefined): TaskList {
    return new TaskList(this.runner, request)
  }

  /** @throws as `addTask` does, see `TaskAdder` */
  add (list: TaskList, fn: unknown, args: unknown[], options: TaskOptions | undefined, reply: ReplyPromises | undefined): BackgroundTask {
    return this.#isAmbient ? asPartOf(list.request, () => this.#add(list, fn, args, options, reply)) : this.#add(list, fn, args, options, reply)
  }

  #add (list: TaskList, fn: unknown, args: unknown[], options: TaskOptions | undefined, reply: ReplyPromises | undefined): BackgroundTask {
    // Most tasks are functions, which do not pay for a look at their prototypes.
    if (typeof fn !== 'function' && isInstance(fn, TaskDefinition)) {
      return this.#addDefined(list, fn as AnyTaskDefinition, args[0], args[1] as JobOptions | undefined, options, reply)
    }
    const { runner } = this
    const task = this.#toTask(fn, args)
    if (!runner.isClosed) runner.ledger.admit()
    task.attachTo(list, optionsNow(list, options))
    if (task === fn) task.captureContext()
    if (runner.isClosed) {
      runner.ledger.refused(list, task)
    } else {
      list.push(task)
      this.#added(list, task)
    }
    return task
  }

  /** Puts a task of a definition, which no request has added, on a list of its own. Another task of its id has ended, if there is one. */
  addAlone (task: DefinedTask): void {
    this.runner.ledger.admit()
    this.jobs.history.replace(task)
    const list = this.listFor(undefined)
    task.attachTo(list, undefined)
    list.pushOnly(task)
    this.#added(list, task)
  }

  /** @throws FST_BGT_INVALID_TASK */
  addCleanup (list: TaskList, fn: unknown, args: unknown[]): void {
    if (!isFunction(fn)) throw invalidTask('addCleanup', fn)
    const cleanup = this.#isAmbient ? asPartOf(list.request, BackgroundTask.of, fn as TaskFunction, args) : BackgroundTask.of(fn as TaskFunction, args)
    cleanup.attachTo(list, undefined)
    if (this.runner.isClosed && isInLateCleanup(list)) {
      this.runner.ledger.cleanupRefused(list, cleanup)
      return
    }
    list.addCleanup(cleanup)
    this.runner.resume(list)
  }

  #addDefined (
    list: TaskList, definition: AnyTaskDefinition, payload: unknown, jobOptions: JobOptions | undefined, options: TaskOptions | undefined, reply: ReplyPromises | undefined
  ): BackgroundTask {
    const { runner, jobs, dispatch } = this
    if (!runner.isClosed) runner.ledger.admit()
    const task = jobs.make(definition, payload, jobOptions, optionsNow(list, options), list.request)
    task.attachTo(list, undefined)
    const isStoredWithReply = reply?.promise(task, dispatch) === true
    if (runner.isClosed) {
      runner.ledger.refused(list, task)
    } else if (dispatch === undefined) {
      jobs.history.add(task)
      list.push(task)
      this.#added(list, task)
    } else {
      list.awaitStore(task)
      this.#added(list, task)
      if (!isStoredWithReply) dispatch.storeUnawaited(list, [task], list.exchange?.outcome ?? list.exchange?.currentOutcome())
    }
    return task
  }

  #added (list: TaskList, task: BackgroundTask): void {
    this.recorder?.taskAdded(this, list, task)
    this.runner.taskAdded(list, task)
    if (this.#waitUntil !== undefined && list.request !== undefined) callWaitUntil(list, this.#waitUntil)
  }

  /** @throws FST_BGT_INVALID_TASK */
  #toTask (fn: unknown, args: unknown[]): BackgroundTask {
    const { lastFunction } = this.runner.ledger
    if (typeof fn === 'function' && !lastFunction.isGenerator(fn as TaskFunction)) return BackgroundTask.of(fn as TaskFunction, args)
    if (isInstance(fn, BackgroundTask) && args.length === 0) return fn
    throw invalidTask('addTask', fn, true)
  }
}

/** The options of a task that is added now. A task that is added while a failure is handled is marked, because it belongs to the failure. */
function optionsNow (list: TaskList, options: TaskOptions | undefined): AddedOptions | undefined {
  return list.exchange?.isHandlingFailure === true ? { ...options, isForFailure: true } : options
}

/** Calls `waitUntil` at the first task of a request. */
function callWaitUntil (list: TaskList, waitUntil: WaitUntil): void {
  const ended = list.whenEnded()
  if (ended === undefined) return
  const failed = (err: unknown): void => {
    attempt(() => { list.log.error({ err }, 'waitUntil failed: the platform may not wait for the background tasks') })
  }
  try {
    // An async function fits the type of `waitUntil`, so there may be a promise that rejects.
    promiseOf(waitUntil(ended))?.catch(failed)
  } catch (error) {
    failed(error)
  }
}
