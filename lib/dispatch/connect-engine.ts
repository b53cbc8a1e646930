import type { FastifyInstance } from 'fastify'
import type { Runner } from '../runner/runner.js'
import type { KnownTask } from '../definitions/definitions.js'
import type { ResolvedOptions } from '../options.js'
import { Dispatch } from './dispatch.js'
import type { TaskEngine, TaskSpec } from '../engines/engine.js'
import { EngineLink } from './engine-link.js'
import { deliver } from './deliver.js'

/** Tasks of definitions go to the engine from now on. */
export function placeOnEngine (
  app: FastifyInstance, runner: Runner, engine: TaskEngine<unknown>, tasks: readonly KnownTask[]
): void {
  const { worker, enqueueTimeout, fallback } = runner.options
  const link = new EngineLink({
    engine,
    tasks: tasks.map(task => specOf(task, worker)),
    log: app.log,
    enqueueTimeout,
    run: worker === false ? undefined : delivery => deliver(runner, delivery)
  })
  runner.link = link
  runner.dispatch = new Dispatch(runner, link, fallback === 'local')

  app.addHook('onReady', async function backgroundTasksOnReady () {
    link.ready()
    // A test that records needs no server.
    if (runner.recorder === undefined) await link.start()
  })
}

function specOf ({ definition: { name, retry, timeout, keep } }: KnownTask, worker: ResolvedOptions['worker']): TaskSpec {
  const own = worker === false || !Object.hasOwn(worker.concurrency, name) ? undefined : worker.concurrency[name]
  const concurrency = worker === false ? 1 : own ?? worker.defaultConcurrency
  return { name, attempts: retry.attempts, timeout, keep, concurrency }
}
