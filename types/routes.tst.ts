import basicAuth from '@fastify/basic-auth'
import Fastify, { type onRequestAsyncHookHandler, type preHandlerHookHandler } from 'fastify'
import type { TypeBoxTypeProvider } from '@fastify/type-provider-typebox'
import { expect, test } from 'tstyche'
import taskRoutes, { taskRoutes as named, type TaskRoutesOptions } from '../lib/routes.js'

test('the routes are registered with a prefix and a guard, in an app of any type provider and server', () => {
  const app = Fastify()
  void app.register(basicAuth, { validate: async () => {} })
  expect(app.register).type.toBeCallableWith(taskRoutes, { prefix: '/tasks', onRequest: app.basicAuth })
  expect(app.register).type.toBeCallableWith(taskRoutes, { prefix: '/tasks', logLevel: 'warn', public: true, payloads: true })
  expect(app.register).type.toBeCallableWith(taskRoutes, { onRequest: [app.basicAuth, async () => {}], preHandler: async (request: { id: string }) => { String(request.id) } })
  expect(Fastify({ http2: true }).withTypeProvider<TypeBoxTypeProvider>().register).type.toBeCallableWith(taskRoutes, { public: true })
  expect(named).type.toBe<typeof taskRoutes>()
})

test('guards are hooks of Fastify, one or several', () => {
  expect<{ onRequest: onRequestAsyncHookHandler }>().type.toBeAssignableTo<TaskRoutesOptions>()
  expect<{ preHandler: preHandlerHookHandler[] }>().type.toBeAssignableTo<TaskRoutesOptions>()
  expect<{ onRequest: undefined, preHandler: undefined, public: undefined, payloads: undefined }>().type.toBeAssignableTo<TaskRoutesOptions>()
  expect<{ onRequest: string }>().type.not.toBeAssignableTo<TaskRoutesOptions>()
  expect<{ public: 'yes' }>().type.not.toBeAssignableTo<TaskRoutesOptions>()
  expect<{ payloads: 1 }>().type.not.toBeAssignableTo<TaskRoutesOptions>()
})
