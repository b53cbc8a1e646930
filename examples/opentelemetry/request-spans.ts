import { ROOT_CONTEXT, SpanKind, context, trace, type Span, type Tracer } from '@opentelemetry/api'
import type { FastifyInstance, FastifyRequest } from 'fastify'

/**
 * A span for each request, active in its hooks and its handler. `@fastify/otel` does this, and more.
 * @returns a function that finds the span of a request
 */
export function traceRequests (app: FastifyInstance, tracer: Tracer): (request: FastifyRequest) => Span | undefined {
  const spans = new WeakMap<FastifyRequest, Span>()

  app.addHook('onRequest', (request, reply, done) => {
    const name = [request.method, request.routeOptions.url].join(' ').trimEnd()
    const span = tracer.startSpan(name, { kind: SpanKind.SERVER }, ROOT_CONTEXT)
    spans.set(request, span)
    // `onResponse` would miss a client that hangs up.
    reply.raw.once('close', () => { span.end() })
    context.with(trace.setSpan(context.active(), span), done)
  })
  return request => spans.get(request)
}
