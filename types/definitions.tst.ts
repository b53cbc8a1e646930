import type { TypeBoxTypeProvider } from '@fastify/type-provider-typebox'
import { Type } from '@sinclair/typebox'
import { type } from 'arktype'
import type { FastifyInstance } from 'fastify'
import type { Piscina } from 'piscina'
import { describe, expect, test } from 'tstyche'
import { Type as Type1 } from 'typebox'
import type { TypeBoxTypeProvider as TypeBoxTypeProvider1 } from 'type-provider-typebox-6'
import * as v from 'valibot'
import { z } from 'zod'
import { declareTask, defineTask, type BackgroundTask, type FastifyBackgroundTasksOptions, type JobCounts, type Receipt, type TaskHealth, type TaskPage, type TaskRecord } from '../lib/index.js'

declare const app: FastifyInstance
const tasks = app.backgroundTasks

describe('what an operator asks for', () => {
  const mail = defineTask({ name: 'mail', payload: Type.Object({ to: Type.String() }), async handler () { return { sent: true } } })

  test('has the type of the result of the definition', () => {
    expect(tasks.count(mail)).type.toBe<Promise<JobCounts>>()
    expect(tasks.find(mail, { state: 'failed', limit: 5, after: 'next', payload: true })).type.toBe<Promise<TaskPage<{ sent: boolean }>>>()
    expect(tasks.retry(mail, 'id')).type.toBe<Promise<boolean>>()
    expect(tasks.cancel(mail, 'id')).type.toBe<Promise<boolean>>()
    expect(tasks.result(mail, 'id', { timeout: 300 })).type.toBe<Promise<TaskRecord<{ sent: boolean }> | undefined>>()
    expect(tasks.health()).type.toBe<TaskHealth>()
  })

  test('accepts a definition or a declaration, and has no option that it does not know', () => {
    expect(tasks.count).type.toBeCallableWith(declareTask({ name: 'declared', payload: Type.String() }))
    expect(tasks.find).type.not.toBeCallableWith(mail)
    expect(tasks.find).type.not.toBeCallableWith(mail, { state: 'lost' })
    expect(tasks.find).type.not.toBeCallableWith(mail, { state: 'failed', offset: 1 })
    expect(tasks.result).type.not.toBeCallableWith(mail, 'id')
    expect(tasks.retry).type.not.toBeCallableWith('mail', 'id')
    expect(tasks.cancel).type.not.toBeCallableWith(mail)
  })
})

describe('the payload of a definition', () => {
  test('is the static type of a TypeBox schema', () => {
    const mail = defineTask({
      name: 'mail',
      payload: Type.Object({ to: Type.String(), copies: Type.Optional(Type.Integer()) }),
      handler (payload, { attempt, signal }) {
        expect(payload).type.toBe<{ to: string, copies?: number }>()
        expect(attempt).type.toBe<number>()
        expect(signal).type.toBe<AbortSignal>()
        return { sent: true }
      },
      onFailed (payload, error, { attempts }) {
        expect(payload).type.toBe<{ to: string, copies?: number }>()
        expect(error).type.toBe<unknown>()
        expect(attempts).type.toBe<number>()
      }
    })
    expect(tasks.addTask(mail, { to: 'a' })).type.toBe<BackgroundTask>()
    expect(tasks.addTask).type.toBeCallableWith(mail, { to: 'a', copies: 1 }, { key: 'k', delay: 1 })
    expect(tasks.with({ timeout: 1 }).addTask).type.toBeCallableWith(mail, { to: 'a' })
    expect(tasks.addTask).type.not.toBeCallableWith(mail)
    expect(tasks.addTask).type.not.toBeCallableWith(mail, { to: 1 })
    expect(tasks.addTask).type.not.toBeCallableWith(mail, { to: 'a' }, { keys: 'k' })
    expect(tasks.enqueue(mail, { to: 'a' })).type.toBe<Promise<Receipt>>()
    expect(tasks.enqueue).type.not.toBeCallableWith(mail, { copies: 1 })
    expect(tasks.get(mail, 'id')).type.toBe<Promise<TaskRecord<{ sent: boolean }> | undefined>>()
  })

  test('is the input of a Standard Schema, and its handler gets the output', () => {
    const zod = defineTask({
      name: 'zod',
      payload: z.object({ at: z.string().transform(text => new Date(text)) }),
      async handler (payload) { expect(payload).type.toBe<{ at: Date }>() }
    })
    const valibot = defineTask({
      name: 'valibot',
      payload: v.object({ n: v.pipe(v.string(), v.transform(Number)) }),
      handler (payload) { expect(payload).type.toBe<{ n: number }>() }
    })
    const arktype = defineTask({
      name: 'arktype',
      payload: type({ to: 'string.email' }),
      handler (payload) { expect(payload).type.toBe<{ to: string }>() }
    })
    expect(tasks.addTask).type.toBeCallableWith(zod, { at: 'now' })
    expect(tasks.addTask).type.not.toBeCallableWith(zod, { at: new Date() })
    expect(tasks.addTask).type.toBeCallableWith(valibot, { n: '1' })
    expect(tasks.addTask).type.not.toBeCallableWith(valibot, { n: 1 })
    expect(tasks.addTask).type.toBeCallableWith(arktype, { to: 'a' })
    expect(tasks.addTask).type.not.toBeCallableWith(arktype, {})
  })

  test('is not lost without a word for a schema that does not say it', () => {
    // @ts-expect-error No overload matches this call
    defineTask({ name: 'lost', payload: Type1.Object({ n: Type1.Number() }), handler () {} })
    expect(defineTask).type.toBeCallableWith({ name: 'by-hand', payload: Type1.Object({ n: Type1.Number() }), handler (payload: { n: number }) { String(payload.n) } })
    expect(defineTask).type.toBeCallableWith({ name: 'json', payload: { type: 'object' }, handler () {} })
  })

  test('comes from a type provider', () => {
    const old = defineTask.withTypeProvider<TypeBoxTypeProvider>()({
      name: 'old', payload: Type.Object({ n: Type.Number() }), handler (payload) { expect(payload).type.toBe<{ n: number }>() }
    })
    const new1 = defineTask.withTypeProvider<TypeBoxTypeProvider1>()({
      name: 'new', payload: Type1.Object({ n: Type1.Number() }), handler (payload) { expect(payload).type.toBe<{ n: number }>() }
    })
    expect(tasks.addTask).type.toBeCallableWith(old, { n: 1 })
    expect(tasks.addTask).type.not.toBeCallableWith(old, { n: '1' })
    expect(tasks.addTask).type.toBeCallableWith(new1, { n: 1 })
    expect(tasks.addTask).type.not.toBeCallableWith(new1, { n: '1' })
  })

  test('is written by hand', () => {
    const hand = defineTask<{ n: number }>({ name: 'hand', payload: { type: 'object' }, handler (payload) { expect(payload).type.toBe<{ n: number }>() } })
    const inferred = defineTask({ name: 'inferred', handler (payload: { n: number }) { return payload.n } })
    expect(tasks.addTask).type.toBeCallableWith(hand, { n: 1 })
    expect(tasks.addTask).type.not.toBeCallableWith(hand, { n: '1' })
    expect(tasks.addTask).type.not.toBeCallableWith(inferred)
    expect(tasks.get(inferred, 'id')).type.toBe<Promise<TaskRecord<number> | undefined>>()
  })

  test('may be left out where there is none', () => {
    const none = defineTask({ name: 'none', handler () {} })
    const maybe = defineTask({ name: 'maybe', handler (n?: number) { return n } })
    expect(tasks.addTask).type.toBeCallableWith(none)
    expect(tasks.addTask).type.toBeCallableWith(none, undefined, { delay: 1 })
    expect(tasks.addTask).type.toBeCallableWith(maybe)
    expect(tasks.addTask).type.toBeCallableWith(maybe, 1)
    expect(tasks.addTask).type.not.toBeCallableWith(maybe, 'a')
  })
})

test('a definition needs a name and a handler, and nothing unknown', () => {
  expect(defineTask).type.not.toBeCallableWith({ handler () {} })
  expect(defineTask).type.not.toBeCallableWith({ name: 'a' })
  expect(defineTask).type.not.toBeCallableWith({ name: 'a', handler () {}, retries: 3 })
  expect(defineTask).type.not.toBeCallableWith({ name: 'a', handler () {}, retry: { backoff: { type: 'linear' } } })
})

describe('a definition with a file', () => {
  test('has its payload from the schema, or by hand', () => {
    const schema = defineTask({ name: 'schema', payload: Type.Object({ path: Type.String() }), file: new URL('file:///resize.js'), onFailed (payload) { expect(payload).type.toBe<{ path: string }>() } })
    const zod = defineTask({ name: 'zod', payload: z.object({ at: z.string().transform(text => new Date(text)) }), file: '/resize.js' })
    const hand = defineTask<{ n: number }>({ name: 'hand', file: '/resize.js' })
    expect(tasks.addTask).type.toBeCallableWith(schema, { path: 'a' })
    expect(tasks.addTask).type.not.toBeCallableWith(schema, { path: 1 })
    expect(tasks.addTask).type.toBeCallableWith(zod, { at: 'now' })
    expect(tasks.addTask).type.not.toBeCallableWith(zod, { at: new Date() })
    expect(tasks.addTask).type.toBeCallableWith(hand, { n: 1 })
    expect(tasks.addTask).type.not.toBeCallableWith(hand, { n: 'a' })
    expect(tasks.get(schema, 'id')).type.toBe<Promise<TaskRecord<unknown> | undefined>>()
  })

  test('has no handler', () => {
    expect(defineTask).type.not.toBeCallableWith({ name: 'both', file: '/resize.js', handler () {} })
    expect(defineTask).type.not.toBeCallableWith({ name: 'relative', file: 7 })
  })
})

describe('a declaration', () => {
  test('takes what its definition takes, and its handler gets the output', () => {
    const mail = declareTask({ name: 'mail', payload: Type.Object({ to: Type.String() }), retry: { attempts: 5 } })
    expect(tasks.addTask).type.toBeCallableWith(mail, { to: 'a' }, { key: 'k' })
    expect(tasks.addTask).type.not.toBeCallableWith(mail, { to: 1 })
    const handled = mail.handledBy(async (payload, { attempt }) => {
      expect(payload).type.toBe<{ to: string }>()
      expect(attempt).type.toBe<number>()
      return { sent: true }
    }, { onFailed (payload) { expect(payload).type.toBe<{ to: string }>() } })
    expect(tasks.get(handled, 'id')).type.toBe<Promise<TaskRecord<{ sent: boolean }> | undefined>>()
    expect(tasks.addTask).type.not.toBeCallableWith(handled, { to: 1 })

    const zod = declareTask({ name: 'zod', payload: z.object({ at: z.string().transform(text => new Date(text)) }) })
    expect(tasks.addTask).type.toBeCallableWith(zod, { at: 'now' })
    zod.handledBy(payload => { expect(payload).type.toBe<{ at: Date }>() })
    const new1 = declareTask.withTypeProvider<TypeBoxTypeProvider1>()({ name: 'new', payload: Type1.Object({ n: Type1.Number() }) })
    new1.handledBy(payload => { expect(payload).type.toBe<{ n: number }>() })
    const hand = declareTask<{ n: number }>({ name: 'hand' })
    expect(hand.handledBy).type.toBeCallableWith(new URL('file:///a.js'))
    expect(hand.handledBy).type.toBeCallableWith('/a.js', { onFailed () {} })
    expect(hand.handledBy).type.not.toBeCallableWith(7)
  })

  test('has no handler', () => {
    expect(declareTask).type.not.toBeCallableWith({ name: 'a', handler () {} })
    // @ts-expect-error No overload matches this call
    declareTask({ name: 'lost', payload: Type1.Object({ n: Type1.Number() }) })
  })
})

test('the value of a context is annotated by the user, and a pool is one of piscina', () => {
  expect<FastifyBackgroundTasksOptions>().type.toBeAssignableFrom({ context: { capture: (request: { ip: string }) => request.ip, restore: (ip: string, run: () => unknown) => { String(ip); return run() } } })
  expect<FastifyBackgroundTasksOptions>().type.not.toBeAssignableFrom({ context: { capture: () => 1 } })
  expect<FastifyBackgroundTasksOptions>().type.toBeAssignableFrom({ threads: {} as Piscina })
})
