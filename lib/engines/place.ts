import type { FastifyInstance, FastifyRequest } from 'fastify'
import { instancesOf } from '../instances.js'
import type { Runner } from '../runner.js'
import type { KnownTask } from '../definitions.js'
import type { ResolvedOptions } from '../options.js'
import { Dispatch } from './dispatch.js'
import type { TaskEngine, TaskSpec } from './engine.js'
import { EngineLink } from './engine-link.js'
import { deliver } from './worker.js'

/** What a request knows of its tasks for the engine. */
export interface Gathered {
  /** Stores them, if there are any. */
  storeBeforeReply: () => Promise<void> | undefined
}

/**
 * Tasks of definitions go to the engine from now on.
 * @param gathered the tasks of a request, if it has any
 */
export function placeOnEngine (
  app: FastifyInstance, runner: Runner, engine: TaskEngine<unknown>, tasks: readonly KnownTask[],
  gathered: (request: FastifyRequest) => Gathered | undefined
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

  // A callback hook: a request without tasks pays for no promise.
  for (const instance of instancesOf(app)) {
    instance.addHook('onSend', (request, _reply, _payload, done) => {
      const storing = gathered(request)?.storeBeforeReply()
      if (storing === undefined) done()
      else storing.then(() => { done() }, done)
    })
  }
  app.addHook('onReady', async () => {
    link.ready()
    // A test that records needs no server.
    if (runner.recorder === undefined) await link.start()
  })
}

function specOf ({ definition: { name, retry, timeout, keep } }: KnownTask, worker: ResolvedOptions['worker']): TaskSpec {
  const concurrency = worker === false ? 1 : worker.concurrency[name] ?? worker.defaultConcurrency
  return { name, attempts: retry.attempts, timeout, keep, concurrency }
}
