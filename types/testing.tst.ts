import Fastify, {
  type FastifyBaseLogger, type FastifyInstance, type RawReplyDefaultExpression, type RawRequestDefaultExpression, type RawServerDefault
} from 'fastify'
import type { TypeBoxTypeProvider } from '@fastify/type-provider-typebox'
import { expect, test } from 'tstyche'
import type { BackgroundTask } from '../lib/index.js'
import { recordTasks, type RecordedTask, type TaskRecorder } from '../lib/testing.js'

test('an app of any type provider, server and logger can be recorded', () => {
  expect(recordTasks(Fastify())).type.toBe<TaskRecorder>()
  expect(recordTasks(Fastify({ http2: true }).withTypeProvider<TypeBoxTypeProvider>())).type.toBe<TaskRecorder>()
  type OwnLogger = FastifyInstance<RawServerDefault, RawRequestDefaultExpression, RawReplyDefaultExpression, FastifyBaseLogger & { audit: () => void }>
  expect(recordTasks).type.toBeCallableWith({} as OwnLogger)
  expect(recordTasks).type.not.toBeCallableWith({})
  expect(recordTasks).type.not.toBeCallableWith()
})

test('what is recorded can be read, and not changed', () => {
  const tasks = recordTasks(Fastify())
  expect(tasks.added).type.toBe<readonly RecordedTask[]>()
  expect<RecordedTask['args']>().type.toBe<readonly unknown[] | undefined>()
  expect<RecordedTask['payload']>().type.toBe<unknown>()
  expect<RecordedTask['requestId']>().type.toBe<string | undefined>()
  expect<RecordedTask['task']>().type.toBe<BackgroundTask>()
  expect(tasks.run()).type.toBe<Promise<void>>()
  expect(tasks.clear()).type.toBe<void>()
  expect(tasks.restore()).type.toBe<void>()
})
