import { AsyncLocalStorage } from 'node:async_hooks'
import { subscribe, tracingChannel, unsubscribe, type TracingChannelSubscribers } from 'node:diagnostics_channel'
import { ROOT_CONTEXT, SpanStatusCode, context, propagation, trace, type Context, type Span } from '@opentelemetry/api'
import type { AsyncLocalStorageContextManager } from '@opentelemetry/context-async-hooks'
import type { FastifyRequest } from 'fastify'
import type { TaskEnqueueMessage, TaskRunMessage } from 'fastify-background-tasks'

export interface TaskSpansOptions {
  /** The process's context manager, the one given to the `NodeSDK` or to `context.setGlobalContextManager`. */
  contextManager: AsyncLocalStorageContextManager
  /** The context of a request, in which its span is. */
  contextOf: (request: FastifyRequest) => Context | null | undefined
}

/**
 * Gives each run of a background task a span of its own. The request's span has ended by then, so the task's is not its child
 * but the root of a new trace, linked to it. Spans made inside the task are children of the task's.
 *
 * A task of a definition carries the span that is active in its `addTask` call, and the baggage, to wherever an engine has it
 * run: in the worker its span is linked to that one.
 * @returns a function that stops it
 */
export function traceTasks ({ contextManager, contextOf }: TaskSpansOptions): () => void {
  const tracer = trace.getTracer('fastify-background-tasks')
  const channel = tracingChannel<Context, TaskRunMessage>('fastify-background-tasks.run')
  const storage = storageOf(contextManager)
  const spans = new WeakMap<TaskRunMessage, Span>()

  // Called in the context of the `addTask` call; what an engine delivers has its own in its headers.
  function startSpan (message: TaskRunMessage): Context {
    const { task, request, queuedMs, attempt, headers } = message
    const own = request === undefined && headers !== undefined ? propagation.extract(ROOT_CONTEXT, headers) : context.active()
    const cause = trace.getSpanContext((request && contextOf(request)) ?? own)
    const span = tracer.startSpan(task.name, {
      root: true,
      links: cause === undefined ? [] : [{ context: cause }],
      attributes: {
        'background_task.id': task.id,
        'background_task.queued_ms': queuedMs,
        ...attempt !== undefined && { 'background_task.attempt': attempt }
      }
    })
    spans.set(message, span)
    return trace.setSpan(own, span)
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
  const inject = (message: unknown): void => {
    const { headers } = message as TaskEnqueueMessage
    propagation.inject(context.active(), headers)
  }

  channel.start.bindStore(storage, startSpan)
  channel.subscribe(subscribers)
  subscribe('fastify-background-tasks.enqueue', inject)
  return () => {
    channel.start.unbindStore(storage)
    channel.unsubscribe(subscribers)
    unsubscribe('fastify-background-tasks.enqueue', inject)
  }
}

/** A tracing channel binds stores, and OpenTelemetry has no public way to the one behind its contexts. */
function storageOf (contextManager: AsyncLocalStorageContextManager): AsyncLocalStorage<Context> {
  const storage: unknown = Reflect.get(contextManager, '_asyncLocalStorage')
  if (!(storage instanceof AsyncLocalStorage)) throw new TypeError('This context manager has no `_asyncLocalStorage`')
  return storage
}
