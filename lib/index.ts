/**
 * FastAPI's background tasks for Fastify: hooks and routes add tasks to the request, the reply goes out, the tasks run in
 * order, and `app.close()` waits for them.
 *
 * @module fastify-background-tasks
 */
import type { FastifyInstance, FastifyRequest } from 'fastify'
import fp from 'fastify-plugin'
import { AppBackgroundTasks } from './decorators/app-background-tasks.js'
import { BackgroundTasks } from './decorators/background-tasks.js'
import { Intake } from './decorators/intake.js'
import { recorderOf } from './decorators/recorder.js'
import { Definitions } from './definitions/definitions.js'
import { Jobs, LOCAL } from './definitions/jobs.js'
import { schemaCompiler } from './definitions/payload.js'
import { logErrorsOf } from './definitions/pool-errors.js'
import { TravellingContext } from './definitions/travelling-context.js'
import { connectEngine } from './dispatch/connect-engine.js'
import { drain, type Drained } from './drain.js'
import { FST_BGT_ALREADY_REGISTERED } from './errors.js'
import { exchangeOf, watchExchanges } from './exchange/watch.js'
import { resolveOptions, type FastifyBackgroundTasksOptions } from './options.js'
import { Runner } from './runner/runner.js'

declare module 'fastify' {
  interface FastifyRequest {
    /** The request's background tasks. */
    readonly backgroundTasks: BackgroundTasks
  }
  interface FastifyInstance {
    /** The app's background tasks outside any request, and the counts of all tasks. */
    readonly backgroundTasks: AppBackgroundTasks
  }
}

async function fastifyBackgroundTasks (app: FastifyInstance, options: FastifyBackgroundTasksOptions): Promise<void> {
  if (app.hasDecorator('backgroundTasks')) throw new FST_BGT_ALREADY_REGISTERED()
  const resolved = resolveOptions(options)
  const { tasks, engine, waitUntil, closeTimeout, ambient, threads, worker, fallback, context } = resolved
  const definitions = new Definitions(tasks, schemaCompiler(app.getSchemas()))
  definitions.refuseUnrunnable({ runsHere: engine === undefined || fallback !== undefined, consumes: engine !== undefined && worker !== false, threads })
  const jobs = new Jobs(app, definitions, engine ?? LOCAL, { threads, context: context && new TravellingContext(context) })
  const runner = new Runner(resolved, app.log)
  const isRecording = (): boolean => intake.recorder !== undefined
  const dispatch = engine && connectEngine(app, engine, { runner, jobs, definitions: definitions.all, options: resolved, isRecording })
  const intake = new Intake(runner, jobs, dispatch, waitUntil, ambient)

  // An exchange is one request and its response. Each exchange has one task list, which is its listener.
  const listOf = (request: FastifyRequest): BackgroundTasks =>
    (exchangeOf(request)?.listener as BackgroundTasks | undefined) ?? new BackgroundTasks(intake, request)

  watchExchanges(app, listOf, ambient)
  app.decorate('backgroundTasks', new AppBackgroundTasks(intake))
  app.decorateRequest('backgroundTasks', {
    getter (this: FastifyRequest) { return listOf(this) }
  })
  recorderOf(app)?.attach(intake)
  if (threads !== undefined) {
    // This hook is added before the drain's own, so Fastify calls it after the drain, and after the hook that closes the pool.
    const stopLogging = logErrorsOf(threads, app.log)
    app.addHook('onClose', async function backgroundTasksPoolOnClose () { stopLogging() })
  }
  drainOnClose(app, intake, { runner, closeTimeout, link: dispatch?.link, dropRecorded: () => { intake.recorder?.drop() } })
}

/**
 * Runs the drain, which finishes the tasks that are left, when the server has closed and the requests in flight have ended. The drain comes
 * before every other plugin's `onClose` hook, so that databases are still open for the tasks, whether they were registered before or after
 * this plugin. Fastify runs `onClose` hooks last registered first, but a hook that is added while `preClose` hooks run comes before them
 * all. If a `preClose` hook of another plugin throws, ours is skipped, and the plain `onClose` hook drains.
 */
function drainOnClose (app: ClosingApp, { resultWaits }: Intake, what: Drained): void {
  let drained: Promise<void> | undefined
  const backgroundTasksOnClose = async (): Promise<void> => {
    resultWaits.close()
    await (drained ??= drain(what))
  }
  app.addHook('preClose', function backgroundTasksPreClose (done) {
    // Requests that wait for a result would hold up the close of the server.
    resultWaits.close()
    app.onClose?.(backgroundTasksOnClose)
    done()
  })
  app.addHook('onClose', backgroundTasksOnClose)
}

/** An app with the method that `addHook('onClose')` calls. Fastify's types leave it out. */
type ClosingApp = FastifyInstance & { onClose?: (fn: () => Promise<void>) => void }

/**
 * The plugin: `await app.register(backgroundTasks, options)`, once for an app, or for one encapsulated plugin and its children. Requests
 * get `request.backgroundTasks`, a {@link BackgroundTasks}. The app gets `app.backgroundTasks`, an {@link AppBackgroundTasks}.
 * @throws FST_BGT_INVALID_OPTION if an option does not exist or has a wrong value
 * @throws FST_BGT_DUPLICATE_TASK if two definitions in `tasks` have the same name
 * @throws FST_BGT_ALREADY_REGISTERED if this app, or a parent of it, has the plugin already
 */
const backgroundTasks = fp(fastifyBackgroundTasks, { fastify: '5.x', name: 'fastify-background-tasks' })

export default backgroundTasks
export { backgroundTasks, backgroundTasks as fastifyBackgroundTasks }
export { BackgroundTask } from './tasks/background-task.js'
export { defineTask } from './definitions/define-task.js'
export { declareTask } from './definitions/declare-task.js'
export type { TaskState } from './tasks/background-task.js'
export type { AddedArgs, AddedTask, JobArgs, TaskAdder } from './decorators/task-adder.js'
export type { OverloadedArgs, OverloadedFunction, TaskFunction } from './tasks/task-function.js'
export type { AnyTaskDefinition, DefineTask, FailedTaskContext, RetryPolicy, TaskContext, TaskDeclarationOptions, TaskDefinition, TaskDefinitionOptions, TaskFailureOptions, TaskFileOptions } from './definitions/define-task.js'
export type { DeclareTask, TaskDeclaration } from './definitions/declare-task.js'
export type { TaskContextOptions } from './definitions/travelling-context.js'
export type { ThreadPool } from './definitions/thread.js'
export type { JobOptions } from './definitions/jobs.js'
export type { EnqueueOptions, FoundRecord, IdleOptions, TaskPage, TaskRecord } from './decorators/app-background-tasks.js'
export type { FindOptions, ResultOptions, TaskHealth } from './decorators/operating.js'
export type { StandardSchema } from './definitions/standard-schema.js'
export type {
  Delivery, EngineEvents, Job, JobCounts, JobError, JobPosition, JobQuery, JobRecord, JobState, Json, Receipt, TaskEngine, TaskSpec, Verdict
} from './engines/engine.js'
export type { BackgroundTasks } from './decorators/background-tasks.js'
export type { AppBackgroundTasks } from './decorators/app-background-tasks.js'
export type { ExchangeOutcome } from './exchange/outcome.js'
export type { FastifyBackgroundTasksOptions } from './options.js'
export type { TaskCondition, TaskOptions } from './tasks/task-options.js'
export type { TaskStats } from './runner/ledger.js'
export type { TaskAbandonedMessage, TaskAddedMessage, TaskEnqueueMessage, TaskFailedMessage, TaskRunMessage, TaskSkippedMessage } from './tasks/diagnostics.js'
