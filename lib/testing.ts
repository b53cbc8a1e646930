/**
 * The test kit, `fastify-background-tasks/testing`: tasks are recorded instead of run.
 *
 * No test runner is needed for it, and no server: what a definition has on an engine is recorded, too.
 *
 * @module testing
 */
import type { FastifyInstance } from 'fastify'
import { AppBackgroundTasks } from './decorators/app-background-tasks.js'
import type { Intake } from './decorators/intake.js'
import { recorderOf, setRecorder, type Recorder } from './decorators/recorder.js'
import { asDefined } from './definitions/defined-task.js'
import type { JobOptions } from './definitions/jobs.js'
import { FST_BGT_INVALID_OPTION, show } from './errors.js'
// Of the whole, for a test may import nothing else: it brings the types of `app.backgroundTasks` along.
import type { BackgroundTask } from './index.js'
import { instancesOf } from './instances.js'
import type { Gate } from './runner/gate.js'
import type { Runner } from './runner/runner.js'
import type { TaskList } from './tasks/task-list.js'
import type { TaskOptions } from './tasks/task-options.js'

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
  /** One for each registration of the plugin. */
  readonly #intakes = new Set<Intake>()
  readonly #recorded = new Set<BackgroundTask>()
  /** The lists that are ready to run, and who runs them. */
  readonly #kept = new Map<TaskList, Runner>()
  #added: RecordedTask[] = []
  #running: TaskList | undefined
  #run: Promise<void> | undefined

  constructor (app: FastifyInstance) {
    this.#app = app
    setRecorder(app, this)
    for (const instance of instancesOf(app)) {
      if (instance.hasDecorator('backgroundTasks')) this.attach(AppBackgroundTasks.intakeOf(instance.backgroundTasks))
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
    const intakes = [...this.#intakes]
    this.detach()
    for (const { dispatch } of intakes) void dispatch?.link.start()
  }

  detach (): void {
    this.drop()
    for (const intake of this.#intakes) {
      intake.recorder = undefined
      intake.runner.gate = undefined
    }
    this.#intakes.clear()
    if (recorderOf(this.#app) === this) setRecorder(this.#app, undefined)
  }

  attach (intake: Intake): void {
    intake.recorder?.detach()
    this.#intakes.add(intake)
    intake.recorder = this
    intake.runner.gate = this.#gateOf(intake.runner)
  }

  taskAdded (intake: Intake, list: TaskList, task: BackgroundTask): void {
    const defined = asDefined(task)
    if (defined !== undefined) defined.dueAt = 0
    this.#recorded.add(task)
    this.#added.push(recordOf(list, task, intake.placement))
  }

  drop (): void {
    for (const task of this.#recorded) task.cancel()
    const kept = [...this.#kept]
    this.#kept.clear()
    for (const [list, runner] of kept) runner.resume(list)
  }

  #gateOf (runner: Runner): Gate {
    return {
      keep: list => {
        // Cleanups alone are no tasks, and a test that does not run its tasks wants its connections back.
        if (list === this.#running || !list.tasks().some(task => this.#recorded.has(task))) return false
        this.#kept.set(list, runner)
        return true
      },
      skipsDelays: task => this.#recorded.has(task)
    }
  }

  async #runAll (): Promise<void> {
    if (this.#intakes.size === 0) {
      throw new FST_BGT_INVALID_OPTION('run of recordTasks: the app has no background tasks; register the plugin in it, and await app.ready()')
    }
    const runners = Array.from(this.#intakes, ({ runner }) => runner)
    for (const { ledger } of runners) ledger.failures.take()
    const releases = runners.map(({ ledger }) => ledger.failures.hold())
    for (;;) {
      const [kept] = this.#kept
      const busy = runners.find(runner => runner.open.size > 0)
      if (kept !== undefined) await this.#runList(...kept)
      else if (busy !== undefined) await new Promise<void>(resolve => { busy.onListDone(resolve) })
      else break
    }
    for (const release of releases) release()
    const [failure] = runners.flatMap(({ ledger }) => ledger.failures.take()).map(error => ({ error }))
    if (failure !== undefined) throw failure.error
  }

  async #runList (list: TaskList, runner: Runner): Promise<void> {
    this.#kept.delete(list)
    this.#running = list
    runner.resume(list)
    while (list.index !== -1) await new Promise<void>(resolve => { runner.onListDone(resolve) })
    this.#running = undefined
  }
}

function recordOf ({ request }: TaskList, task: BackgroundTask, placement: string): RecordedTask {
  const { name, timeout, when } = task.options ?? {}
  const defined = asDefined(task)
  const own = defined === undefined ? { name } : { key: defined.envelope.key, delay: defined.envelope.delayMs || undefined }
  const options = Object.entries({ ...own, timeout, when }).filter(([, value]) => value !== undefined)
  return {
    name: task.name,
    ...defined === undefined ? { args: task.args } : { payload: defined.toStored().payload },
    ...request !== undefined && { requestId: request.id },
    placement: defined === undefined ? 'local' : placement,
    options: Object.fromEntries(options),
    task
  }
}
