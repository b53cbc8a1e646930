import { AsyncLocalStorage } from 'node:async_hooks'
import { tracingChannel, type TracingChannelSubscribers } from 'node:diagnostics_channel'
import { SpanStatusCode, context, trace, type Context, type Span, type Tracer } from '@opentelemetry/api'
import type { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import type { FastifyRequest } from 'fastify'
import type { TaskRunMessage } from 'fastify-background-tasks'

export interface TaskSpansOptions {
  tracer: Tracer
  /** The app's context manager, the one given to `context.setGlobalContextManager` or to the `NodeSDK`. */
  contextManager: AsyncLocalStorageContextManager
  /** The span of a request; with `@fastify/otel`: `request => request.opentelemetry().span`. */
  spanOf: (request: FastifyRequest) => Span | null | undefined
}

/**
 * Gives each background task a span of its own. The request's span has ended by the time its tasks run, so the task's is not
 * its child but the root of a new trace, linked to it. Spans made inside the task are children of the task's.
 * @returns a function that stops it
 */
export function traceTasks ({ tracer, contextManager, spanOf }: TaskSpansOptions): () => void {
  const channel = tracingChannel<Context, TaskRunMessage>('fastify-background-tasks.run')
  const storage = storageOf(contextManager)
  const spans = new WeakMap<TaskRunMessage, Span>()

  // Called in the context of the `addTask` call, whose baggage the task keeps.
  function startSpan (message: TaskRunMessage): Context {
    const { task, request, queuedMs } = message
    const cause = request === undefined ? trace.getActiveSpan() : spanOf(request)
    const span = tracer.startSpan(task.name, {
      root: true,
      links: cause == null ? [] : [{ context: cause.spanContext() }],
      attributes: { 'background_task.id': task.id, 'background_task.queued_ms': queuedMs }
    })
    spans.set(message, span)
    return trace.setSpan(context.active(), span)
  }

  const subscribers: TracingChannelSubscribers<TaskRunMessage> = {
    start () {},
    end (message) {
      const isAsync = !('result' in message || 'error' in message)
      if (!isAsync) spans.get(message)?.end()
    },
    asyncStart () {},
    asyncEnd (message) { spans.get(message)?.end() },
    error (message) {
      const error = message.error instanceof Error ? message.error : new Error(String(message.error))
      const span = spans.get(message)
      span?.recordException(error)
      span?.setStatus({ code: SpanStatusCode.ERROR, message: error.message })
    }
  }
  channel.start.bindStore(storage, startSpan)
  channel.subscribe(subscribers)
  return () => {
    channel.start.unbindStore(storage)
    channel.unsubscribe(subscribers)
  }
}

/** A tracing channel binds stores, and OpenTelemetry has no public way to the one behind its contexts. */
function storageOf (contextManager: AsyncLocalStorageContextManager): AsyncLocalStorage<Context> {
  const storage: unknown = Reflect.get(contextManager, '_asyncLocalStorage')
  if (!(storage instanceof AsyncLocalStorage)) throw new TypeError('This context manager has no `_asyncLocalStorage`')
  return storage
}
