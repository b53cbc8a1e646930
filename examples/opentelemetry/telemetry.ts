import { FastifyOtelInstrumentation } from '@fastify/otel'
import { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import { NodeSDK, type NodeSDKConfiguration } from '@opentelemetry/sdk-node'
import type { FastifyPluginCallback } from 'fastify'
import { traceTasks } from './task-spans.js'

export interface Telemetry {
  /** Gives each request a span. Register it first. */
  requests: FastifyPluginCallback
  /** Once the app has closed: what has not been exported is. */
  stop: () => Promise<void>
}

/**
 * Starts OpenTelemetry, once a process: spans of requests and of background tasks, in web processes and in workers. Where
 * they go is said by the `OTEL_*` environment variables, unless the options say more.
 */
export function startTelemetry (options: Partial<NodeSDKConfiguration> = {}): Telemetry {
  const fastify = new FastifyOtelInstrumentation({
    // One for each hook, those of the plugin of the tasks included, is more than most want to see.
    instrumentHooks: false,
    requestHook (span, { method, routeOptions: { url } }) { span.updateName(url === undefined ? method : `${method} ${url}`) }
  })
  const contextManager = new AsyncLocalStorageContextManager()
  const sdk = new NodeSDK({ ...options, instrumentations: [fastify], contextManager })
  sdk.start()
  // Not its `span`, which is gone once the reply is.
  const stopTasks = traceTasks({ contextManager, contextOf: request => request.opentelemetry().context })
  return {
    requests: fastify.plugin(),
    async stop () {
      stopTasks()
      await sdk.shutdown()
    }
  }
}
