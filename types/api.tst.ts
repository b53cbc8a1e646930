import type { TracingChannel } from 'node:diagnostics_channel'
import Fastify, { type FastifyInstance, type FastifyPluginAsync, type FastifyRequest } from 'fastify'
import { describe, expect, test } from 'tstyche'
import backgroundTasks, {
  backgroundTasks as named, BackgroundTask, fastifyBackgroundTasks,
  type AppBackgroundTasks, type BackgroundTasks, type ExchangeOutcome, type FastifyBackgroundTasksOptions, type IdleOptions,
  type TaskAbandonedMessage, type TaskAddedMessage, type TaskAdder, type TaskCondition, type TaskFailedMessage, type TaskOptions,
  type TaskRunMessage, type TaskSkippedMessage, type TaskState, type TaskStats
} from '../lib/index.js'

interface Row { id: string }
type Size = 'small' | 'large'

declare const app: FastifyInstance
declare const request: FastifyRequest

function nothing (): void {}
function greet (name: string): void { String(name) }
async function mail (to: string, body: { subject: string }): Promise<number> { return to.length + body.subject.length }
function optional (name: string, times?: number): void { String([name, times]) }
function withDefault (name = 'nobody'): void { String(name) }
function rest (name: string, ...times: number[]): void { String([name, times]) }
function literals (size: Size, order: { kind: 'tea' | 'coffee' }): void { String([size, order]) }
function callback (times: number, then: (error: Error | null, row: Row) => void): void { then(null, { id: String(times) }) }
function eitherTuple (...args: [name: string, times: number] | [isFirst: boolean]): void { String(args) }

function notify (channel: 'mail', to: string): void
function notify (channel: 'sms', to: number, options: { flash: 'yes' | 'no' }): Promise<void>
function notify (channel: 'pager', then: (row: Row) => void): void
function notify (...args: unknown[]): unknown { return args }

function maybe (): void
function maybe (name: string, times: number): void
function maybe (...args: unknown[]): unknown { return args }

function pair<T> (first: T, second: T): T[] { return [first, second] }
function pick<T, K extends keyof T> (from: T, key: K): T[K] { return from[key] }
async function each<T extends Row> (rows: T[], then: (row: T) => void): Promise<void> { rows.forEach(then) }

describe('the decorators', () => {
  test('are on every request and app', () => {
    expect(request.backgroundTasks).type.toBe<BackgroundTasks>()
    expect(app.backgroundTasks).type.toBe<AppBackgroundTasks>()
    expect<BackgroundTasks>().type.toBeAssignableTo<TaskAdder>()
    expect<AppBackgroundTasks>().type.toBeAssignableTo<TaskAdder>()
  })

  test('are not to be assigned', () => {
    expect<Pick<FastifyRequest, 'backgroundTasks'>>().type.toBe<{ readonly backgroundTasks: BackgroundTasks }>()
    expect<Pick<FastifyInstance, 'backgroundTasks'>>().type.toBe<{ readonly backgroundTasks: AppBackgroundTasks }>()
  })
})

describe('addTask', () => {
  const tasks = request.backgroundTasks

  test('returns the task', () => {
    expect(tasks.addTask(greet, 'Ann')).type.toBe<BackgroundTask>()
    expect(app.backgroundTasks.addTask(greet, 'Ann')).type.toBe<BackgroundTask>()
    expect(tasks.with({ name: 'hello' }).addTask(greet, 'Ann')).type.toBe<BackgroundTask>()
    expect(app.backgroundTasks.with({ name: 'hello' }).addTask(greet, 'Ann')).type.toBe<BackgroundTask>()
  })

  test('takes the arguments of the function', () => {
    expect(tasks.addTask).type.toBeCallableWith(nothing)
    expect(tasks.addTask).type.toBeCallableWith(greet, 'Ann')
    expect(tasks.addTask).type.toBeCallableWith(mail, 'Ann', { subject: 'Hi' })
    expect(tasks.addTask).type.toBeCallableWith(async () => {})
    expect(tasks.addTask).type.toBeCallableWith(console.log, 1, 'two', {})
    expect(app.backgroundTasks.addTask).type.toBeCallableWith(mail, 'Ann', { subject: 'Hi' })
    expect(tasks.with({}).addTask).type.toBeCallableWith(mail, 'Ann', { subject: 'Hi' })
    expect(app.backgroundTasks.with({}).addTask).type.toBeCallableWith(mail, 'Ann', { subject: 'Hi' })
    const args: [string, { subject: string }] = ['Ann', { subject: 'Hi' }]
    expect(tasks.addTask).type.toBeCallableWith(mail, ...args)
  })

  test('refuses wrong arguments', () => {
    expect(tasks.addTask).type.not.toBeCallableWith(greet, 1)
    expect(tasks.addTask).type.not.toBeCallableWith(mail, 'Ann', { subject: 1 })
    expect(tasks.addTask).type.not.toBeCallableWith(mail, { subject: 'Hi' }, 'Ann')
    expect(tasks.addTask).type.not.toBeCallableWith((name: string) => name, 1)
    expect(app.backgroundTasks.addTask).type.not.toBeCallableWith(greet, 1)
    expect(tasks.with({}).addTask).type.not.toBeCallableWith(greet, 1)
    expect(app.backgroundTasks.with({}).addTask).type.not.toBeCallableWith(greet, 1)
  })

  test('refuses missing arguments', () => {
    expect(tasks.addTask).type.not.toBeCallableWith(greet)
    expect(tasks.addTask).type.not.toBeCallableWith(mail, 'Ann')
    expect(app.backgroundTasks.addTask).type.not.toBeCallableWith(greet)
    expect(tasks.with({}).addTask).type.not.toBeCallableWith(greet)
    expect(app.backgroundTasks.with({}).addTask).type.not.toBeCallableWith(greet)
  })

  test('refuses too many arguments', () => {
    expect(tasks.addTask).type.not.toBeCallableWith(greet, 'Ann', 1)
    expect(tasks.addTask).type.not.toBeCallableWith(nothing, 1)
    expect(tasks.addTask).type.not.toBeCallableWith(() => {}, 1)
    expect(tasks.addTask).type.not.toBeCallableWith(async () => {}, undefined)
    expect(app.backgroundTasks.addTask).type.not.toBeCallableWith(nothing, 1)
    expect(tasks.with({}).addTask).type.not.toBeCallableWith(nothing, 1)
    expect(app.backgroundTasks.with({}).addTask).type.not.toBeCallableWith(nothing, 1)
  })

  test('says what is wrong, and where', () => {
    // @ts-expect-error Argument of type 'number' is not assignable to parameter of type 'string'
    tasks.addTask(greet, 1)
    // @ts-expect-error Expected 2 arguments, but got 1
    tasks.addTask(greet)
    // @ts-expect-error Expected 2 arguments, but got 3
    tasks.addTask(greet, 'Ann', 1)
    // @ts-expect-error Argument of type '["mail", number]' is not assignable to parameter of type '[channel: "mail", to: string] |
    tasks.addTask(notify, 'mail', Math.PI)
  })

  test('takes optional, default and rest parameters', () => {
    expect(tasks.addTask).type.toBeCallableWith(optional, 'Ann')
    expect(tasks.addTask).type.toBeCallableWith(optional, 'Ann', 2)
    expect(tasks.addTask).type.toBeCallableWith(optional, 'Ann', undefined)
    expect(tasks.addTask).type.not.toBeCallableWith(optional, 'Ann', 'two')
    expect(tasks.addTask).type.not.toBeCallableWith(optional, 'Ann', 2, 3)
    expect(tasks.addTask).type.toBeCallableWith(withDefault)
    expect(tasks.addTask).type.toBeCallableWith(withDefault, 'Ann')
    expect(tasks.addTask).type.not.toBeCallableWith(withDefault, 1)
    expect(tasks.addTask).type.not.toBeCallableWith(withDefault, 'Ann', 1)
    expect(tasks.addTask).type.toBeCallableWith(rest, 'Ann')
    expect(tasks.addTask).type.toBeCallableWith(rest, 'Ann', 1, 2, 3)
    expect(tasks.addTask).type.not.toBeCallableWith(rest, 'Ann', 1, 'two')
    expect(tasks.addTask).type.not.toBeCallableWith(rest)
    expect(tasks.addTask).type.toBeCallableWith(eitherTuple, 'Ann', 1)
    expect(tasks.addTask).type.toBeCallableWith(eitherTuple, true)
    expect(tasks.addTask).type.not.toBeCallableWith(eitherTuple, true, 1)
  })

  test('keeps literals', () => {
    expect(tasks.addTask).type.toBeCallableWith(literals, 'small', { kind: 'tea' })
    expect(tasks.addTask).type.not.toBeCallableWith(literals, 'medium', { kind: 'tea' })
    expect(tasks.addTask).type.not.toBeCallableWith(literals, 'small', { kind: 'cola' })
    const size: string = 'small'
    expect(tasks.addTask).type.not.toBeCallableWith(literals, size, { kind: 'tea' })
  })

  test('types the parameters of callbacks', () => {
    tasks.addTask(callback, 1, (error, row) => {
      expect(error).type.toBe<Error | null>()
      expect(row).type.toBe<Row>()
    })
    tasks.addTask((name, times) => {
      expect(name).type.toBe<string>()
      expect(times).type.toBe<number>()
    }, 'Ann', 2)
    tasks.addTask(notify, 'pager', row => { expect(row).type.toBe<Row>() })
    expect(tasks.addTask).type.not.toBeCallableWith(callback, 1, (error: string) => error)
  })

  test('takes every signature of an overloaded function', () => {
    expect(tasks.addTask).type.toBeCallableWith(notify, 'mail', 'Ann')
    expect(tasks.addTask).type.toBeCallableWith(notify, 'sms', 1, { flash: 'yes' })
    expect(tasks.addTask).type.toBeCallableWith(notify, 'pager', (row: Row) => row)
    expect(tasks.addTask).type.toBeCallableWith(maybe)
    expect(tasks.addTask).type.toBeCallableWith(maybe, 'Ann', 1)
    expect(app.backgroundTasks.addTask).type.toBeCallableWith(notify, 'mail', 'Ann')
    expect(tasks.with({}).addTask).type.toBeCallableWith(notify, 'mail', 'Ann')
    expect(app.backgroundTasks.with({}).addTask).type.toBeCallableWith(notify, 'mail', 'Ann')
  })

  test('refuses what no signature takes', () => {
    expect(tasks.addTask).type.not.toBeCallableWith(notify, 'mail', 1)
    expect(tasks.addTask).type.not.toBeCallableWith(notify, 'mail', 'Ann', { flash: 'yes' })
    expect(tasks.addTask).type.not.toBeCallableWith(notify, 'sms', 1)
    expect(tasks.addTask).type.not.toBeCallableWith(notify, 'sms', 1, { flash: 'maybe' })
    expect(tasks.addTask).type.not.toBeCallableWith(notify, 'fax', 'Ann')
    expect(tasks.addTask).type.not.toBeCallableWith(notify)
    expect(tasks.addTask).type.not.toBeCallableWith(maybe, 'Ann')
    expect(tasks.addTask).type.not.toBeCallableWith(maybe, 1, 2)
    expect(app.backgroundTasks.addTask).type.not.toBeCallableWith(notify, 'mail', 1)
  })

  test('infers the call of a generic function', () => {
    expect(tasks.addTask).type.toBeCallableWith(pair, 1, 2)
    expect(tasks.addTask).type.not.toBeCallableWith(pair, 1, 'two')
    expect(tasks.addTask).type.toBeCallableWith(pick, { a: 1, b: 2 }, 'b')
    expect(tasks.addTask).type.not.toBeCallableWith(pick, { a: 1, b: 2 }, 'c')
    expect(tasks.addTask).type.not.toBeCallableWith(each, [{ name: 'Ann' }], () => {})
    tasks.addTask(each, [{ id: 'x', size: 1 }], row => { expect(row).type.toBeAssignableTo<Row>() })
  })

  test('passes on the arguments of a generic caller', () => {
    function later<Args extends unknown[]> (fn: (...args: Args) => void, ...args: Args): void {
      expect(tasks.addTask(fn, ...args)).type.toBe<BackgroundTask>()
    }
    expect(later).type.toBeCallableWith(greet, 'Ann')
  })

  test('takes a BackgroundTask alone', () => {
    expect(tasks.addTask).type.toBeCallableWith(new BackgroundTask(greet, 'Ann'))
    expect(tasks.addTask).type.toBeCallableWith(new BackgroundTask(notify, 'mail', 'Ann'))
    expect(tasks.addTask).type.not.toBeCallableWith(new BackgroundTask(greet, 'Ann'), 'Ann')
    expect(app.backgroundTasks.addTask).type.toBeCallableWith(new BackgroundTask(greet, 'Ann'))
    expect(tasks.with({}).addTask).type.toBeCallableWith(new BackgroundTask(greet, 'Ann'))
    expect(app.backgroundTasks.with({}).addTask).type.toBeCallableWith(new BackgroundTask(greet, 'Ann'))
  })

  test('refuses what is no task', () => {
    expect(tasks.addTask).type.not.toBeCallableWith()
    expect(tasks.addTask).type.not.toBeCallableWith('greet')
    expect(tasks.addTask).type.not.toBeCallableWith(null)
    expect(tasks.addTask).type.not.toBeCallableWith(undefined)
    expect(tasks.addTask).type.not.toBeCallableWith(mail('Ann', { subject: 'Hi' }))
    expect(tasks.addTask).type.not.toBeCallableWith({ id: '1', name: 'greet', state: 'pending' as const })
    const unsure: (() => void) | undefined = Math.random() > 0.5 ? nothing : undefined
    expect(tasks.addTask).type.not.toBeCallableWith(unsure)
  })
})

describe('addCleanup', () => {
  const { addCleanup } = request.backgroundTasks

  test('takes a function with its arguments, and returns nothing', () => {
    expect(request.backgroundTasks.addCleanup(greet, 'Ann')).type.toBe<void>()
    expect(addCleanup).type.toBeCallableWith(mail, 'Ann', { subject: 'Hi' })
    expect(addCleanup).type.toBeCallableWith(notify, 'mail', 'Ann')
    expect(addCleanup).type.toBeCallableWith(optional, 'Ann')
    expect(addCleanup).type.toBeCallableWith(pair, 1, 2)
    request.backgroundTasks.addCleanup(callback, 1, (error, row) => {
      expect(error).type.toBe<Error | null>()
      expect(row).type.toBe<Row>()
    })
  })

  test('refuses wrong, missing and too many arguments, and a BackgroundTask', () => {
    expect(addCleanup).type.not.toBeCallableWith(greet, 1)
    expect(addCleanup).type.not.toBeCallableWith(greet)
    expect(addCleanup).type.not.toBeCallableWith(greet, 'Ann', 1)
    expect(addCleanup).type.not.toBeCallableWith(nothing, 1)
    expect(addCleanup).type.not.toBeCallableWith(notify, 'mail', 1)
    expect(addCleanup).type.not.toBeCallableWith(new BackgroundTask(greet, 'Ann'))
  })

  test('is not for the app, nor for a single task', () => {
    expect(app.backgroundTasks).type.not.toHaveProperty('addCleanup')
    expect(request.backgroundTasks.with({})).type.not.toHaveProperty('addCleanup')
  })
})

describe('new BackgroundTask', () => {
  test('takes a function with its arguments', () => {
    expect(BackgroundTask).type.toBeConstructableWith(nothing)
    expect(BackgroundTask).type.toBeConstructableWith(mail, 'Ann', { subject: 'Hi' })
    expect(BackgroundTask).type.toBeConstructableWith(literals, 'small', { kind: 'tea' })
    expect(BackgroundTask).type.toBeConstructableWith(optional, 'Ann')
    expect(BackgroundTask).type.toBeConstructableWith(notify, 'mail', 'Ann')
    expect(BackgroundTask).type.toBeConstructableWith(notify, 'sms', 1, { flash: 'no' })
    expect(BackgroundTask).type.toBeConstructableWith(pair, 1, 2)
    expect(new BackgroundTask(callback, 1, (error, row) => {
      expect(error).type.toBe<Error | null>()
      expect(row).type.toBe<Row>()
    })).type.toBeAssignableTo<BackgroundTask>()
  })

  test('refuses wrong, missing and too many arguments', () => {
    expect(BackgroundTask).type.not.toBeConstructableWith()
    expect(BackgroundTask).type.not.toBeConstructableWith('greet')
    expect(BackgroundTask).type.not.toBeConstructableWith(greet, 1)
    expect(BackgroundTask).type.not.toBeConstructableWith(greet)
    expect(BackgroundTask).type.not.toBeConstructableWith(greet, 'Ann', 1)
    expect(BackgroundTask).type.not.toBeConstructableWith(nothing, 1)
    expect(BackgroundTask).type.not.toBeConstructableWith(notify, 'mail', 1)
    expect(BackgroundTask).type.not.toBeConstructableWith(pair, 1, 'two')
  })

  test('has an id, a name, a state, a signal, cancel() and run()', () => {
    const task = new BackgroundTask(greet, 'Ann')
    expect(task.id).type.toBe<string>()
    expect(task.name).type.toBe<string>()
    expect(task.state).type.toBe<TaskState>()
    expect(task.signal).type.toBe<AbortSignal>()
    expect(task.cancel()).type.toBe<boolean>()
    expect(task.run()).type.toBe<Promise<void>>()
    expect(task.run).type.not.toBeCallableWith('Ann')
    expect<TaskState>().type.toBe<
      'pending' | 'running' | 'succeeded' | 'failed' | 'skipped' | 'abandoned' | 'enqueued'
    >()
    // @ts-expect-error Cannot assign to 'state' because it is a read-only property.
    task.state = 'running'
  })
})

describe('with', () => {
  const tasks = request.backgroundTasks

  test('takes when, timeout and name', () => {
    expect(tasks.with({})).type.toBe<TaskAdder>()
    expect(tasks.with).type.toBeCallableWith({ when: 'always', timeout: 5_000, name: 'audit' })
    expect(tasks.with).type.toBeCallableWith({ when: 'error' })
    expect(tasks.with).type.toBeCallableWith({ when: undefined, timeout: undefined, name: undefined })
    tasks.with({
      when: outcome => {
        expect(outcome).type.toBe<ExchangeOutcome>()
        return outcome.statusCode < 400
      }
    })
  })

  test('refuses other options and wrong values', () => {
    expect(tasks.with).type.not.toBeCallableWith()
    expect(tasks.with).type.not.toBeCallableWith('audit')
    expect(tasks.with).type.not.toBeCallableWith({ when: 'never' })
    expect(tasks.with).type.not.toBeCallableWith({ when: true })
    expect(tasks.with).type.not.toBeCallableWith({ when: async () => true })
    expect(tasks.with).type.not.toBeCallableWith({ timeout: '5s' })
    expect(tasks.with).type.not.toBeCallableWith({ timeout: null })
    expect(tasks.with).type.not.toBeCallableWith({ name: 1 })
    expect(tasks.with).type.not.toBeCallableWith({ retries: 1 })
  })

  test('of the app has no exchange to ask', () => {
    expect(app.backgroundTasks.with({})).type.toBe<TaskAdder>()
    expect(app.backgroundTasks.with).type.toBeCallableWith({ timeout: 5_000, name: 'audit' })
    expect(app.backgroundTasks.with).type.toBeCallableWith({ timeout: undefined, name: undefined })
    expect(app.backgroundTasks.with).type.not.toBeCallableWith({ when: 'always' })
    expect(app.backgroundTasks.with).type.not.toBeCallableWith({ name: 'audit', when: () => true })
    const options: TaskOptions = { when: 'always' }
    expect(app.backgroundTasks.with).type.not.toBeCallableWith(options)
  })
})

test('a list says its length, signal and outcome', () => {
  expect(request.backgroundTasks.length).type.toBe<number>()
  expect(request.backgroundTasks.signal).type.toBe<AbortSignal>()
  expect(request.backgroundTasks.outcome).type.toBe<ExchangeOutcome | undefined>()
  expect<ExchangeOutcome>().type.toBe<{
    readonly statusCode: number, readonly failed: boolean, readonly error?: unknown, readonly aborted: boolean
  }>()
})

test('the app says its length, signal and stats, and when it is idle', () => {
  expect(app.backgroundTasks.length).type.toBe<number>()
  expect(app.backgroundTasks.signal).type.toBe<AbortSignal>()
  expect(app.backgroundTasks.stats).type.toBe<TaskStats>()
  expect<TaskStats>().type.toBe<{
    readonly [count in
      'pending' | 'running' | 'succeeded' | 'failed' | 'skipped' | 'abandoned' | 'enqueued' | 'oldestPendingMs'
    ]: number
  }>()
  expect(app.backgroundTasks.idle()).type.toBe<Promise<void>>()
  expect(app.backgroundTasks.idle).type.toBeCallableWith({ rejectOnFailure: true })
  expect(app.backgroundTasks.idle).type.toBeCallableWith({ rejectOnFailure: undefined })
  expect(app.backgroundTasks.idle).type.not.toBeCallableWith({ rejectOnFailure: 'yes' })
  expect(app.backgroundTasks.idle).type.not.toBeCallableWith({ reject: true })
  expect<IdleOptions>().type.toBe<{ readonly rejectOnFailure?: boolean | undefined }>()
})

describe('register', () => {
  const all = {
    when: 'success',
    stopOnError: true,
    onError: () => {},
    concurrency: 10,
    maxPending: Infinity,
    timeout: 1_000,
    slowTask: 500,
    closeTimeout: 0,
    waitUntil: () => {}
  } as const

  test('takes the plugin under each of its names, with and without options', () => {
    expect(app.register).type.toBeCallableWith(backgroundTasks)
    expect(app.register).type.toBeCallableWith(named, all)
    expect(app.register).type.toBeCallableWith(fastifyBackgroundTasks, {})
    expect(app.register).type.toBeCallableWith(backgroundTasks, () => all)
    expect(app.register).type.toBeCallableWith(import('../lib/index.js'), all)
    expect(named).type.toBe<typeof backgroundTasks>()
    expect(fastifyBackgroundTasks).type.toBe<typeof backgroundTasks>()
    expect(backgroundTasks).type.toBeAssignableTo<FastifyPluginAsync<FastifyBackgroundTasksOptions>>()
  })

  test('is possible on every kind of app', () => {
    expect(Fastify({ http2: true }).register).type.toBeCallableWith(backgroundTasks, all)
    expect(Fastify({ http2: true, https: {} }).register).type.toBeCallableWith(backgroundTasks, all)
    expect(Fastify({ loggerInstance: Fastify().log }).register).type.toBeCallableWith(backgroundTasks, all)
  })

  test('takes the options of register itself', () => {
    expect(app.register).type.toBeCallableWith(backgroundTasks, { ...all, prefix: '/x', logLevel: 'warn', logSerializers: {} })
  })

  test('takes undefined for each option', () => {
    expect(app.register).type.toBeCallableWith(backgroundTasks, {
      when: undefined,
      stopOnError: undefined,
      onError: undefined,
      concurrency: undefined,
      maxPending: undefined,
      timeout: undefined,
      slowTask: undefined,
      closeTimeout: undefined,
      waitUntil: undefined
    })
  })

  test('refuses a wrong value of each option, and unknown options', () => {
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { when: 'never' })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { when: () => 'yes' })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { when: async () => true })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { stopOnError: 'yes' })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { onError: 'log' })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { onError: (error: Error) => error })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { concurrency: '10' })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { maxPending: 10n })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { timeout: '5s' })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { slowTask: new Date() })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { closeTimeout: false })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { waitUntil: Promise.resolve() })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { timeout: null })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, { timeOut: 1 })
    expect(app.register).type.not.toBeCallableWith(backgroundTasks, () => ({ timeout: '5s' }))
  })

  test('types onError, when and waitUntil', () => {
    app.register(backgroundTasks, {
      when: outcome => {
        expect(outcome).type.toBe<ExchangeOutcome>()
        return !outcome.aborted
      },
      onError: (error, task, request) => {
        expect(error).type.toBe<unknown>()
        expect(task).type.toBe<BackgroundTask>()
        expect(request).type.toBe<FastifyRequest | undefined>()
      },
      waitUntil: promise => {
        expect(promise).type.toBe<Promise<void>>()
      }
    })
    expect(app.register).type.toBeCallableWith(backgroundTasks, { onError: async () => {} })
    expect<TaskCondition>().type.toBe<'success' | 'error' | 'always' | ((outcome: ExchangeOutcome) => boolean)>()
  })
})

test('the messages of the channels name the task and its request', () => {
  expect<TaskAddedMessage>().type.toBe<{ task: BackgroundTask, request?: FastifyRequest }>()
  expect<TaskRunMessage['queuedMs']>().type.toBe<number>()
  expect<TaskRunMessage>().type.toBeAssignableTo<TaskAddedMessage>()
  expect<TaskSkippedMessage>().type.toBeAssignableTo<TaskAddedMessage & { reason: string }>()
  expect<TaskFailedMessage>().type.toBeAssignableTo<TaskAddedMessage & { error: unknown }>()
  expect<TaskAbandonedMessage>().type.toBeAssignableTo<TaskAddedMessage & { ageMs: number }>()
  expect<TracingChannel<unknown, TaskRunMessage>>().type.toHaveProperty('subscribe')
})
