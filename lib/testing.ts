/**
 * The test kit, `fastify-background-tasks/testing`: tasks are recorded instead of run.
 *
 * It needs no test runner and no server: tasks of definitions are recorded too, whatever engine would store them.
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
// This type comes from the main module, because that brings the types of `app.backgroundTasks` along, and a test may import nothing else.
import type { BackgroundTask } from './index.js'
import { instancesOf } from './instances.js'
import type { Gate } from './runner/gate.js'
import type { Runner } from './runner/runner.js'
import type { TaskList } from './tasks/task-list.js'
import type { TaskOptions } from './tasks/task-options.js'

/** A task that was added. */
export interface RecordedTask {
  /** The name of the definition, the name that `with()` gave, the name of the function, or `'anonymous'`. */
  readonly name: string
  /** The arguments of a function. A definition has none. */
  readonly args?: readonly unknown[]
  /** The payload of a definition, as JSON. A function has none. */
  readonly payload?: unknown
  /** The id of the request that added the task. A task of the app has none. */
  readonly requestId?: string
  /** Where the task would run: `'local'`, or the name of the engine. */
  readonly placement: string
  /** The options of `with()`, of the definition and of the call, without those that nobody set. */
  readonly options: TaskOptions & JobOptions
  /** The task itself, for its `id`, its `state`, and `cancel()`. */
  readonly task: BackgroundTask
}

/** What {@link recordTasks} returns. */
export interface TaskRecorder {
  /**
   * The tasks that were added since the start or the last `clear()`, in the order added. Tasks that were skipped, or have run since, are
   * among them.
   */
  readonly added: readonly RecordedTask[]
  /**
   * Runs the recorded tasks, list by list and in order, and the tasks that these add. Tasks of requests in flight follow when the requests
   * have ended. Everything is as in production, `when`, `timeout`, `onError`, cleanups and the log included, except that nobody waits: a
   * delay is over immediately, and attempts follow each other without their backoff. Rejects with the first failure, after all tasks have
   * run. An attempt that is followed by another one is no failure.
   * @throws FST_BGT_INVALID_OPTION if the plugin is not registered in this app
   */
  run: () => Promise<void>
  /** Forgets the tasks that were added. Those that have not run are `skipped`. The cleanups of their requests run. */
  clear: () => void
  /** Ends the recording. Tasks that have not run are `skipped`. Tasks that are added from now on run as usual. */
  restore: () => void
}

/**
 * Records the tasks of an app, and of its encapsulated plugins, from now on, instead of running them: tasks of requests, tasks of the app,
 * and tasks of definitions, on any engine. The app does not connect to its engine, unless it has done so already, so call this before
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
  /** The intakes of the app, one for each registration of the plugin. */
  readonly #intakes = new Set<Intake>()
  readonly #recorded = new Set<BackgroundTask>()
  /** The lists that are ready to run, each with its runner. */
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
        // A list that has only cleanups is not kept, because a test that does not run its tasks still wants its connections back.
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
