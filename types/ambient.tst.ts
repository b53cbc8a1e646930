import { Type } from '@sinclair/typebox'
import { expect, test } from 'tstyche'
import { addTask, requestTasks } from '../lib/ambient.js'
import { BackgroundTask, defineTask, type BackgroundTasks, type TaskAdder } from '../lib/index.js'

function mail (to: string, times: number): void { String([to, times]) }

test('addTask has the types of that of a request', () => {
  expect(addTask).type.toBe<TaskAdder['addTask']>()
  expect(addTask(mail, 'ada', 1)).type.toBe<BackgroundTask>()
  expect(addTask).type.not.toBeCallableWith(mail, 'ada')
  expect(addTask).type.not.toBeCallableWith(mail, 1, 'ada')
  expect(addTask(new BackgroundTask(mail, 'ada', 1))).type.toBe<BackgroundTask>()
  const definition = defineTask({ name: 'mail', payload: Type.Object({ to: Type.String() }), handler () {} })
  expect(addTask).type.toBeCallableWith(definition, { to: 'ada' }, { delay: 1 })
  expect(addTask).type.not.toBeCallableWith(definition, { to: 1 })
})

test('requestTasks may find none', () => {
  expect(requestTasks()).type.toBe<BackgroundTasks | undefined>()
})
