import type { FastifyInstance } from 'fastify'
import { isOnlyDeclared, type CompiledDefinition } from '../definitions/definitions.js'
import type { Jobs } from '../definitions/jobs.js'
import type { TaskEngine, TaskSpec } from '../engines/engine.js'
import type { Runner } from '../runner/runner.js'
import { cancelDelivery, deliver } from './deliver.js'
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
  const tasks = definitions.map(compiled => specOf(compiled, worker))
  const link = new EngineLink({
    engine,
    tasks,
    log: app.log,
    enqueueTimeout,
    cancelled: (task, id) => { cancelDelivery(runner, task, id) },
    run: tasks.some(({ concurrency }) => concurrency > 0) ? delivery => deliver(runner, jobs, delivery) : undefined
  })

  app.addHook('onReady', async function backgroundTasksOnReady () {
    link.ready()
    if (!isRecording()) await link.start()
  })
  return new Dispatch(runner, jobs.history, link, fallback === 'local')
}

function specOf ({ definition }: CompiledDefinition, worker: EngineOptions['worker']): TaskSpec {
  const { name, retry, timeout, keep } = definition
  return { name, attempts: retry.attempts, timeout, keep, concurrency: isOnlyDeclared(definition) ? 0 : concurrencyOf(name, worker) }
}

function concurrencyOf (name: string, worker: EngineOptions['worker']): number {
  if (worker === false) return 0
  return (Object.hasOwn(worker.concurrency, name) ? worker.concurrency[name] : undefined) ?? worker.defaultConcurrency
}
