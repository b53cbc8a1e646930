import type { FastifyInstance } from 'fastify'
import type { CompiledDefinition } from '../definitions/definitions.js'
import type { Jobs } from '../definitions/jobs.js'
import type { TaskEngine, TaskSpec } from '../engines/engine.js'
import type { Runner } from '../runner/runner.js'
import { deliver } from './deliver.js'
import { Dispatch } from './dispatch.js'
import { EngineLink } from './engine-link.js'

/** Options of `register` about the engine, with their defaults. */
export interface EngineOptions {
  readonly worker: false | { readonly defaultConcurrency: number, readonly concurrency: Readonly<Record<string, number>> }
  readonly enqueueTimeout: number
  readonly fallback: 'local' | undefined
}

/** What the link to an engine needs of the app. */
export interface EngineUser {
  readonly runner: Runner
  readonly jobs: Jobs
  readonly definitions: readonly CompiledDefinition[]
  readonly options: EngineOptions
  /** Whether a test records tasks, for which no server is needed. */
  readonly isRecording: () => boolean
}

/** Makes the app's way to its engine. The link is made now, and is started when the app is ready. */
export function connectEngine (app: FastifyInstance, engine: TaskEngine<unknown>, user: EngineUser): Dispatch {
  const { runner, jobs, definitions, options, isRecording } = user
  const { worker, enqueueTimeout, fallback } = options
  const link = new EngineLink({
    engine,
    tasks: definitions.map(compiled => specOf(compiled, worker)),
    log: app.log,
    enqueueTimeout,
    run: worker === false ? undefined : delivery => deliver(runner, jobs, delivery)
  })

  app.addHook('onReady', async function backgroundTasksOnReady () {
    link.ready()
    if (!isRecording()) await link.start()
  })
  return new Dispatch(runner, jobs.history, link, fallback === 'local')
}

function specOf ({ definition: { name, retry, timeout, keep } }: CompiledDefinition, worker: EngineOptions['worker']): TaskSpec {
  const own = worker === false || !Object.hasOwn(worker.concurrency, name) ? undefined : worker.concurrency[name]
  const concurrency = worker === false ? 1 : own ?? worker.defaultConcurrency
  return { name, attempts: retry.attempts, timeout, keep, concurrency }
}
