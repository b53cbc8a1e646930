import { Type } from '@sinclair/typebox'
import type { FastifyPluginAsyncTypebox, FastifyPluginCallbackTypebox, TypeBoxTypeProvider } from '@fastify/type-provider-typebox'
import Fastify, { type FastifyReply, type FastifyRequest } from 'fastify'
import { describe, expect, test } from 'tstyche'
import type { FastifyPluginAsyncTypebox as FastifyPluginAsyncTypebox1, TypeBoxTypeProvider as TypeBox1TypeProvider } from 'type-provider-typebox-6'
import { Type as Type1 } from 'typebox'
import backgroundTasks, { type BackgroundTasks } from '../lib/index.js'

interface Order { id: string, size: 'small' | 'large' }

async function brew (order: Order): Promise<void> { String(order) }
function page (page: { page: number }): void { String(page) }
function audit (action: 'brew', params: { shop: string }, trace: { 'x-trace': string }): void { String([action, params, trace]) }
function wrong (order: { id: number }): void { String(order) }

describe('@sinclair/typebox', () => {
  const schema = {
    body: Type.Object({ id: Type.String(), size: Type.Union([Type.Literal('small'), Type.Literal('large')]) }),
    querystring: Type.Object({ page: Type.Number() }),
    params: Type.Object({ shop: Type.String() }),
    headers: Type.Object({ 'x-trace': Type.String() })
  }
  const app = Fastify().withTypeProvider<TypeBoxTypeProvider>()

  test('takes the plugin', () => {
    expect(app.register).type.toBeCallableWith(backgroundTasks)
    expect(app.register).type.toBeCallableWith(backgroundTasks, { when: 'always' })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { when: 'never' })
  })

  test('checks a task against the schemas in the handler', () => {
    app.post('/:shop', { schema }, async request => {
      const { addTask } = request.backgroundTasks
      expect(request.backgroundTasks).type.toBe<BackgroundTasks>()
      expect(addTask).type.toBeCallableWith(brew, request.body)
      expect(addTask).type.toBeCallableWith(page, request.query)
      expect(addTask).type.toBeCallableWith(audit, 'brew', request.params, request.headers)
      expect(addTask).type.toBeCallableWith((id: string, size: string) => id + size, request.body.id, request.body.size)
      expect(addTask).type.not.toBeCallableWith(wrong, request.body)
      expect(addTask).type.not.toBeCallableWith(brew, request.query)
      expect(addTask).type.not.toBeCallableWith(page, request.params)
      expect(addTask).type.not.toBeCallableWith(brew, request.body.id)
      expect(request.backgroundTasks.with({ when: 'always' }).addTask).type.toBeCallableWith(brew, request.body)
      expect(request.backgroundTasks.with({ when: 'always' }).addTask).type.not.toBeCallableWith(wrong, request.body)
      expect(request.backgroundTasks.addCleanup).type.toBeCallableWith(brew, request.body)
      expect(request.backgroundTasks.addCleanup).type.not.toBeCallableWith(wrong, request.body)
      expect(app.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
    })
  })

  test('checks a task against the schemas in every hook of the route', () => {
    app.route({
      method: 'POST',
      url: '/:shop',
      schema,
      onRequest: (request, _reply, done) => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(page, request.query)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(page, request.params)
        done()
      },
      preParsing: async (request, _reply, payload) => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(page, request.query)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(page, request.params)
        return payload
      },
      preValidation: async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      },
      preHandler: [async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      }],
      preSerialization: async (request, _reply, payload) => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
        return payload
      },
      onSend: async (request, _reply, payload) => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
        return payload
      },
      onResponse: async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      },
      onError: async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      },
      onTimeout: async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      },
      onRequestAbort: async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      },
      errorHandler: (_error, request) => {
        expect(request.backgroundTasks).type.toBe<BackgroundTasks>()
      },
      handler: async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      }
    })
  })

  test('has the tasks in every hook and handler of the app', () => {
    app.addHook('onRequest', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.addHook('preParsing', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.addHook('preValidation', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.addHook('preHandler', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.addHook('preSerialization', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.addHook('onSend', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.addHook('onResponse', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.addHook('onError', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.addHook('onTimeout', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.addHook('onRequestAbort', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.setErrorHandler((_error, request) => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.setNotFoundHandler(request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
  })

  test('has the tasks in a typed plugin', () => {
    const shop: FastifyPluginAsyncTypebox<{ name: string }> = async function (app, { name }) {
      await app.register(backgroundTasks, { when: 'always' })
      app.post('/:shop', { schema }, async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
        expect(app.backgroundTasks.addTask).type.toBeCallableWith(page, request.query)
        return name
      })
    }
    const synchronous: FastifyPluginCallbackTypebox = (app, _options, done) => {
      app.post('/:shop', { schema }, request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      })
      done()
    }
    expect(app.register).type.toBeCallableWith(shop, { name: 'corner' })
    expect(app.register).type.toBeCallableWith(synchronous)
  })
})

describe('typebox', () => {
  const schema = {
    body: Type1.Object({ id: Type1.String(), size: Type1.Union([Type1.Literal('small'), Type1.Literal('large')]) }),
    querystring: Type1.Object({ page: Type1.Number() }),
    params: Type1.Object({ shop: Type1.String() }),
    headers: Type1.Object({ 'x-trace': Type1.String() })
  }
  const app = Fastify().withTypeProvider<TypeBox1TypeProvider>()

  test('takes the plugin', () => {
    expect(app.register).type.toBeCallableWith(backgroundTasks)
    expect(app.register).type.toBeCallableWith(backgroundTasks, { when: 'always' })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { when: 'never' })
  })

  test('checks a task against the schemas in the handler', () => {
    app.post('/:shop', { schema }, async request => {
      const { addTask } = request.backgroundTasks
      expect(request.backgroundTasks).type.toBe<BackgroundTasks>()
      expect(addTask).type.toBeCallableWith(brew, request.body)
      expect(addTask).type.toBeCallableWith(page, request.query)
      expect(addTask).type.toBeCallableWith(audit, 'brew', request.params, request.headers)
      expect(addTask).type.not.toBeCallableWith(wrong, request.body)
      expect(addTask).type.not.toBeCallableWith(brew, request.query)
      expect(addTask).type.not.toBeCallableWith(page, request.params)
      expect(addTask).type.not.toBeCallableWith(brew, request.body.id)
      expect(request.backgroundTasks.with({ when: 'always' }).addTask).type.not.toBeCallableWith(wrong, request.body)
      expect(request.backgroundTasks.addCleanup).type.not.toBeCallableWith(wrong, request.body)
      expect(app.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
    })
  })

  test('checks a task against the schemas in the hooks of the route', () => {
    app.route({
      method: 'POST',
      url: '/:shop',
      schema,
      onRequest: async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(page, request.query)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(page, request.params)
      },
      preParsing: async (request, _reply, payload) => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(page, request.query)
        return payload
      },
      preValidation: async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      },
      preHandler: async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      },
      preSerialization: async (request, _reply, payload) => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        return payload
      },
      onSend: async (request, _reply, payload) => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        return payload
      },
      onResponse: async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      },
      onError: async request => { expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body) },
      onTimeout: async request => { expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body) },
      onRequestAbort: async request => { expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body) },
      errorHandler: (_error, request) => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() },
      handler: async request => { expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body) }
    })
  })

  test('has the tasks in the hooks and handlers of the app', () => {
    app.addHook('onRequest', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.addHook('onTimeout', async request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.setErrorHandler((_error, request) => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
    app.setNotFoundHandler(request => { expect(request.backgroundTasks).type.toBe<BackgroundTasks>() })
  })

  test('has the tasks in a typed plugin', () => {
    const shop: FastifyPluginAsyncTypebox1 = async function (app) {
      await app.register(backgroundTasks)
      app.post('/:shop', { schema }, async request => {
        expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
        expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
      })
    }
    expect(app.register).type.toBeCallableWith(shop)
  })
})

describe('without a type provider', () => {
  test('the types that a route names are checked', () => {
    Fastify().post<{ Body: Order, Querystring: { page: number } }>('/', async request => {
      expect(request.backgroundTasks.addTask).type.toBeCallableWith(brew, request.body)
      expect(request.backgroundTasks.addTask).type.toBeCallableWith(page, request.query)
      expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(wrong, request.body)
    })
  })

  test('a body of which nothing is known is refused', () => {
    Fastify().post('/', async request => {
      expect(request.backgroundTasks.addTask).type.not.toBeCallableWith(brew, request.body)
    })
  })

  test('a dependency is typed once, for any route', () => {
    async function chargeLater (request: FastifyRequest, reply: FastifyReply): Promise<void> {
      expect(request.backgroundTasks.addTask).type.toBeCallableWith(page, { page: reply.statusCode })
    }
    expect(Fastify().get).type.toBeCallableWith('/', { preHandler: chargeLater }, async () => 'ok')
    expect(Fastify().withTypeProvider<TypeBoxTypeProvider>().get)
      .type.toBeCallableWith('/', { preHandler: [chargeLater] }, async () => 'ok')
  })
})
