/**
 * The test kit, `fastify-background-tasks/testing`: tasks are recorded instead of run.
 *
 * No test runner is needed for it, and no server: what a definition has on an engine is recorded, too.
 *
 * @module testing
 */
import type { FastifyInstance } from 'fastify'
import { AppBackgroundTasks } from './decorators/app-background-tasks.js'
import type { JobOptions } from './definitions/jobs.js'
import type { Dispatch } from './dispatch/dispatch.js'
import { FST_BGT_INVALID_OPTION, show } from './errors.js'
// Of the whole, for a test may import nothing else: it brings the types of `app.backgroundTasks` along.
import type { BackgroundTask } from './index.js'
import { instancesOf } from './instances.js'
import type { TaskOptions } from './options.js'
import { recorderOf, setRecorder, type Recorder } from './decorators/recorder.js'
import type { Runner } from './runner/runner.js'
import type { TaskList } from './tasks/task-list.js'

/** What was added. */
export interface RecordedTask {
  /** The definition's name, that of `with()`, the function's, or `'anonymous'`. */
  readonly name: string
  /** The arguments of a function; none for a definition. */
  readonly args?: readonly unknown[]
  /** The payload of a definition, as JSON; none for a function. */
  readonly payload?: unknown
  /** The id of the request whose task it is; none for a task of the app. */
  readonly requestId?: string
  /** Where it would run: `'local'`, or the name of the engine. */
  readonly placement: string
  /** What `with()`, the definition, and the call said, without what was left out. */
  readonly options: TaskOptions & JobOptions
  /** The task itself, for its `id`, its `state`, and `cancel()`. */
  readonly task: BackgroundTask
}

/** What {@link recordTasks} returns. */
export interface TaskRecorder {
  /** What was added since the start or the last `clear()`, in the order added; tasks that were skipped or have run since are among them. */
  readonly added: readonly RecordedTask[]
  /**
   * Runs what is recorded, list by list, in order, and what these tasks add, once the requests in flight have ended. All of it is
   * as in production, `when`, `timeout`, `onError`, cleanups and the log included, but nobody waits: a delay is over, and attempts
   * follow each other without their backoff. Rejects with the first failure, when all have run; an attempt that another one
   * follows is no failure.
   * @throws FST_BGT_INVALID_OPTION if the plugin is not registered in this app
   */
  run: () => Promise<void>
  /** Forgets what was added: what has not run is `skipped`. Their requests' cleanups run. */
  clear: () => void
  /** Ends the recording: what has not run is `skipped`, what is added from now on runs as usual. */
  restore: () => void
}

/**
 * Records the tasks of an app, and of its encapsulated plugins, instead of running them, from now on: those of requests, those
 * of the app, and those of definitions, on any engine. That is not connected to, unless it is already: call this before
 * `app.ready()`. A second call takes the place of the first.
 * @param app before or after the plugin is registered
 * @throws FST_BGT_INVALID_OPTION if it is not a Fastify app
 */
export function recordTasks (app: { readonly backgroundTasks: AppBackgroundTasks }): TaskRecorder {
  if (typeof (app as Partial<FastifyInstance> | null | undefined)?.hasDecorator !== 'function') {
    throw new FST_BGT_INVALID_OPTION(`recordTasks accepts a Fastify app; received ${show(app)}`)
  }
  return new Recording(app as FastifyInstance)
}

class Recording implements TaskRecorder, Recorder {
  readonly #app: FastifyInstance
  /** Of each plugin, and its way to its engine. */
  readonly #runners = new Map<Runner, Dispatch | undefined>()
  readonly #recorded = new Set<BackgroundTask>()
  /** The lists that are ready to run. */
  readonly #kept = new Set<TaskList>()
  #added: RecordedTask[] = []
  #running: TaskList | undefined
  #run: Promise<void> | undefined

  constructor (app: FastifyInstance) {
    this.#app = app
    setRecorder(app, this)
    for (const instance of instancesOf(app)) {
      if (instance.hasDecorator('backgroundTasks')) this.attach(AppBackgroundTasks.runnerOf(instance.backgroundTasks))
    }
  }

  get added (): readonly RecordedTask[] {
    return this.#added
  }

  async run (): Promise<void> {
    this.#run ??= this.#runAll().finally(() => { this.#run = undefined })
    await this.#run
  }

  clear (): void {
    this.#added = []
    this.drop()
  }

  restore (): void {
    const runners = [...this.#runners.keys()]
    this.detach()
    for (const { link } of runners) void link?.start()
  }

  detach (): void {
    this.drop()
    for (const [runner, dispatch] of this.#runners) {
      runner.recorder = undefined
      runner.dispatch = dispatch
    }
    this.#runners.clear()
    if (recorderOf(this.#app) === this) setRecorder(this.#app, undefined)
  }

  attach (runner: Runner): void {
    runner.recorder?.detach()
    this.#runners.set(runner, runner.dispatch)
    runner.recorder = this
    runner.dispatch = undefined
  }

  has (task: BackgroundTask): boolean {
    return this.#recorded.has(task)
  }

  keep (list: TaskList): boolean {
    // Cleanups alone are no tasks, and a test that does not run its tasks wants its connections back.
    if (list === this.#running || !list.tasks().some(task => this.has(task))) return false
    this.#kept.add(list)
    return true
  }

  taskAdded (list: TaskList, task: BackgroundTask): void {
    const job = task.options?.job
    if (job !== undefined) job.dueAt = 0
    this.#recorded.add(task)
    this.#added.push(recordOf(list, task, this.#runners.get(list.runner)))
  }

  drop (): void {
    for (const task of this.#recorded) task.cancel()
    const lists = [...this.#kept]
    this.#kept.clear()
    for (const list of lists) list.runner.wake(list)
  }

  async #runAll (): Promise<void> {
    if (this.#runners.size === 0) {
      throw new FST_BGT_INVALID_OPTION('run of recordTasks: the app has no background tasks; register the plugin in it, and await app.ready()')
    }
    const runners = [...this.#runners.keys()]
    for (const { ledger } of runners) ledger.failures.take()
    const releases = runners.map(({ ledger }) => ledger.failures.hold())
    for (;;) {
      const [list] = this.#kept
      const runner = list?.runner ?? runners.find(runner => runner.open.size > 0)
      if (runner === undefined) break
      if (list === undefined) await new Promise<void>(resolve => { runner.onLeave(resolve) })
      else await this.#runList(list)
    }
    for (const release of releases) release()
    const [failure] = runners.flatMap(({ ledger }) => ledger.failures.take()).map(error => ({ error }))
    if (failure !== undefined) throw failure.error
  }

  async #runList (list: TaskList): Promise<void> {
    this.#kept.delete(list)
    this.#running = list
    list.runner.wake(list)
    while (list.place !== -1) await new Promise<void>(resolve => { list.runner.onLeave(resolve) })
    this.#running = undefined
  }
}

function recordOf ({ request }: TaskList, task: BackgroundTask, dispatch: Dispatch | undefined): RecordedTask {
  const { name, timeout, when, job } = task.options ?? {}
  const own = job === undefined ? { name } : { key: job.origin.key, delay: job.origin.delayMs || undefined }
  const options = Object.entries({ ...own, timeout, when }).filter(([, value]) => value !== undefined)
  return {
    name: task.name,
    ...job === undefined ? { args: task.args } : { payload: job.toStored().payload },
    ...request !== undefined && { requestId: request.id },
    placement: job === undefined || dispatch === undefined ? 'local' : dispatch.link.engine.name,
    options: Object.fromEntries(options),
    task
  }
}
