/** What an operator can do in every placement: count, find, retry, cancel, wait for a result, and ask whether all is well. */
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { setTimeout as sleep } from 'node:timers/promises'
import type { FastifyInstance } from 'fastify'
import type { Test } from 'tap'
import { defineTask, type AnyTaskDefinition, type FastifyBackgroundTasksOptions, type JobState, type TaskAddedMessage, type TaskRecord } from '../../lib/index.js'
import type { Started } from '../support/app.js'
import type { PlacementUnderTest } from './suite.js'

type OnPlace = (t: Test, tasks: readonly AnyTaskDefinition[], options?: FastifyBackgroundTasksOptions) => Promise<Started>

const UNKNOWN = '00000000-0000-4000-8000-000000000000'
/** Ids that no engine has made. */
const ODD_IDS = ['', 'x', '*', UNKNOWN, `${UNKNOWN}\0`, 'a:b', '__proto__', '\'; drop table job; --', 'x'.repeat(5_000), 'wait', 'meta']

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(10)
}

/** Functions that wait until each of them is let go. */
class Gates {
  readonly #open = new Map<string, () => void>()

  async wait (name: string): Promise<void> {
    await new Promise<void>(resolve => { this.#open.set(name, resolve) })
  }

  open (name: string): void {
    this.#open.get(name)?.()
  }
}

export async function operating (t: Test, { supports, engine }: PlacementUnderTest, onPlace: OnPlace): Promise<void> {
  const stateOf = async (app: FastifyInstance, definition: AnyTaskDefinition, id: string): Promise<JobState | undefined> =>
    (await app.backgroundTasks.get(definition as never, id))?.state
  const untilState = async (app: FastifyInstance, definition: AnyTaskDefinition, id: string, state: JobState): Promise<void> => {
    await until(async () => await stateOf(app, definition, id) === state)
  }

  await t.test('count tells how many there are in each state', async t => {
    const gates = new Gates()
    const counted = defineTask({
      name: 'counted',
      retry: { attempts: 2, backoff: { type: 'fixed', delay: 60_000 }, when: error => (error as Error).message !== 'final' },
      async handler (kind: string) {
        if (kind === 'hang') await gates.wait('hang')
        if (kind !== 'ok' && kind !== 'hang') throw new Error(kind)
      }
    })
    const idle = defineTask({ name: 'idle-one', handler () {} })
    const { app } = await onPlace(t, [counted, idle])
    if (!supports.count) {
      await t.rejects(app.backgroundTasks.count(counted), { code: 'FST_BGT_UNSUPPORTED' })
      return
    }
    for (const kind of ['ok', 'hang', 'final', 'final', 'again']) await app.backgroundTasks.enqueue(counted, kind)
    await app.backgroundTasks.enqueue(counted, 'later', { delay: 60_000 })
    const expected = supports.find ? { pending: 0, delayed: 1, running: 1, retrying: 1, failed: 2 } : { pending: 0, failed: 2 }
    await until(async () => (await app.backgroundTasks.count(counted)).failed === 2)
    if (supports.find) await until(async () => (await app.backgroundTasks.count(counted)).retrying === 1)
    t.strictSame(await app.backgroundTasks.count(counted), expected)
    t.strictSame(await app.backgroundTasks.count(idle), supports.find ? { pending: 0, delayed: 0, running: 0, retrying: 0, failed: 0 } : { pending: 0, failed: 0 })
    gates.open('hang')
    if (engine === undefined) return
    const web = await onPlace(t, [defineTask({ name: 'unserved', handler () {} })], { worker: false })
    const unserved = defineTask({ name: 'unserved-2', handler () {} })
    const other = await onPlace(t, [unserved], { worker: false })
    for (let i = 0; i < 3; i++) await other.app.backgroundTasks.enqueue(unserved)
    await until(async () => (await other.app.backgroundTasks.count(unserved)).pending === 3)
    await web.app.close()
  })

  await t.test('find reads the records of a state, newest first, page by page, also while they are retried', async t => {
    let isMended = false
    const found = defineTask({
      name: 'found',
      retry: { attempts: 1 },
      handler ({ n, fails }: { n: number, fails: boolean }) {
        if (fails && !isMended) throw new TypeError(`no ${n}`)
        return n
      }
    })
    const { app } = await onPlace(t, [found])
    const tasks = app.backgroundTasks
    if (!supports.find) {
      await t.rejects(tasks.find(found, { state: 'failed' }), { code: 'FST_BGT_UNSUPPORTED', message: /does not support "find"/ })
      return
    }
    const ids: string[] = []
    for (let n = 0; n < 7; n++) {
      ids.push((await tasks.enqueue(found, { n, fails: n < 5 })).id)
      await sleep(2)
    }
    await until(async () => (await tasks.count(found)).failed === 5 && await stateOf(app, found, ids[6] ?? '') === 'succeeded' && await stateOf(app, found, ids[5] ?? '') === 'succeeded')
    const all = await tasks.find(found, { state: 'failed' })
    t.strictSame(all.records.map(({ id }) => id), ids.slice(0, 5).reverse())
    t.equal(all.next, undefined)
    t.match(all.records[0], { name: 'found', state: 'failed', attempt: 1, error: { name: 'TypeError', message: 'no 4' } })
    t.notOk(all.records.some(record => 'payload' in record), 'no payload, unless it is asked for')
    t.strictSame(all.records[0], await tasks.get(found, ids[4] ?? ''), 'the record that get reads')
    t.strictSame((await tasks.find(found, { state: 'failed', payload: true })).records.map(({ payload }) => payload), [4, 3, 2, 1, 0].map(n => ({ n, fails: true })))
    t.match(await tasks.find(found, { state: 'succeeded' }), { records: [{ id: ids[6], result: 6 }, { id: ids[5], result: 5 }] })
    for (const state of ['pending', 'delayed', 'running', 'retrying', 'skipped', 'abandoned'] as const) t.strictSame(await tasks.find(found, { state }), { records: [] }, state)

    isMended = true
    const retried: string[] = []
    const sizes: number[] = []
    for (let after: string | undefined, isFirst = true; isFirst || after !== undefined; isFirst = false) {
      const { records, next } = await tasks.find(found, { state: 'failed', limit: 2, after })
      sizes.push(records.length)
      for (const { id } of records) if (await tasks.retry(found, id)) retried.push(id)
      after = next
    }
    t.strictSame(retried, ids.slice(0, 5).reverse(), 'a loop that retries what it reads leaves out none')
    t.strictSame(sizes, [2, 2, 1])
    await until(async () => (await tasks.find(found, { state: 'succeeded' })).records.length === 7)
    const last = await tasks.find(found, { state: 'succeeded', limit: 6 })
    t.strictSame((await tasks.find(found, { state: 'succeeded', after: last.next })).records.map(({ id }) => id), ids.slice(0, 1))
    const forged = (text: string): string => Buffer.from(text).toString('base64url')
    for (const after of [`8640000000000000 ${UNKNOWN}`, '-8640000000000000 x', '1 \0\n', '1 *', `1 ${'x'.repeat(5_000)}`, `${Date.now()} 'x; drop table job; --`]) {
      t.ok((await tasks.find(found, { state: 'succeeded', after: forged(after) })).records.length <= 7, 'a place that somebody has made')
    }
    for (const after of ['8640000000000001 x', '1', '1 ', 'x y', `1 ${String.fromCharCode(0xfffd)}`]) await t.rejects(tasks.find(found, { state: 'failed', after: forged(after) }), { code: 'FST_BGT_INVALID_OPTION', message: /"after"/ })
    for (const [options, message] of [
      [{}, /"state" of find is required, and accepts one of pending, /], [{ state: 'lost' }, /"state" of find accepts one of pending, .*received 'lost'/], [{ state: 'failed', limit: 0 }, /an integer from 1 to 500; received 0/],
      [{ state: 'failed', limit: 501 }, /1 to 500/], [{ state: 'failed', limit: 1.5 }, /1 to 500/], [{ state: 'failed', after: 'none' }, /"after" of find accepts the "next" of another page/],
      [{ state: 'failed', after: 7 }, /"after"/], [{ state: 'failed', offset: 1 }, /no option "offset"/], [undefined, /find accepts an object of options/]
    ] as const) await t.rejects(tasks.find(found, options as never), { code: 'FST_BGT_INVALID_OPTION', message })
  })

  await t.test('retry starts a job again that has failed for good, with its payload and all its attempts', async t => {
    const starts: unknown[] = []
    const told: number[] = []
    const doomed = defineTask({
      name: 'doomed-again',
      retry: { attempts: 2, backoff: { type: 'fixed', delay: 20 } },
      handler (payload: { z: number, a: number }, { id, attempt, requestId }) { starts.push({ payload, id, attempt, requestId }); throw new Error('no') },
      onFailed (_payload, _error, { attempts }) { told.push(attempts) }
    })
    const { app } = await onPlace(t, [doomed])
    const tasks = app.backgroundTasks
    if (!supports.retry) {
      await t.rejects(tasks.retry(doomed, UNKNOWN), { code: 'FST_BGT_UNSUPPORTED' })
      return
    }
    const { id } = await tasks.enqueue(doomed, { z: 1, a: 2 })
    await until(() => told.length === 1)
    await until(async () => !supports.count || (await tasks.count(doomed)).failed === 1)
    const both = await Promise.all([tasks.retry(doomed, id), tasks.retry(doomed, id)])
    t.strictSame(both.toSorted(), [false, true], 'of two calls one starts it')
    await until(() => told.length === 2)
    t.strictSame(starts, [1, 2, 1, 2].map(attempt => ({ payload: { z: 1, a: 2 }, id, attempt, requestId: undefined })))
    t.strictSame(told, [2, 2])
    if (supports.get) {
      await untilState(app, doomed, id, 'failed')
      t.match(await tasks.get(doomed, id), { state: 'failed', attempt: 2 })
    }
    for (const odd of ODD_IDS) t.equal(await tasks.retry(doomed, odd), false, JSON.stringify(JSON.stringify(odd.slice(0, 40))))
    await t.rejects(tasks.retry(doomed, 7 as never), { code: 'FST_BGT_INVALID_TASK' })
    await t.rejects(tasks.retry({} as never, id), { code: 'FST_BGT_INVALID_TASK' })
    await t.rejects(tasks.retry(defineTask({ name: 'stranger', handler () {} }), id), { code: 'FST_BGT_UNKNOWN_TASK' })
  })

  await t.test('a job that has not failed is not retried', async t => {
    if (!supports.retry || !supports.get) return
    const gates = new Gates()
    const one = defineTask({ name: 'not-failed', async handler (kind: string) { if (kind === 'hang') await gates.wait(kind) } })
    const { app } = await onPlace(t, [one])
    const tasks = app.backgroundTasks
    const ids = await Promise.all(['ok', 'hang'].map(async kind => (await tasks.enqueue(one, kind)).id))
    ids.push((await tasks.enqueue(one, 'later', { delay: 60_000 })).id)
    const states = ['succeeded', 'running', 'delayed'] as const
    for (const [i, id] of ids.entries()) await untilState(app, one, id, states[i] ?? 'failed')
    for (const [i, id] of ids.entries()) t.equal(await tasks.retry(one, id), false, String(states[i]))
    gates.open('hang')
  })

  await t.test('a cancelled job that waits does not run, its record is skipped, and its key is free', async t => {
    const ran: string[] = []
    let failures = 0
    const waiting = defineTask({
      name: 'waiting',
      retry: { attempts: 2, backoff: { type: 'fixed', delay: 60_000 } },
      handler (kind: string) { ran.push(kind); if (kind === 'again') throw new Error(kind) },
      onFailed () { failures++ }
    })
    const { app } = await onPlace(t, [waiting])
    const tasks = app.backgroundTasks
    if (!supports.cancel) {
      await t.rejects(tasks.cancel(waiting, UNKNOWN), { code: 'FST_BGT_UNSUPPORTED' })
      return
    }
    const delayed = await tasks.enqueue(waiting, 'delayed', { delay: 60_000, key: 'k' })
    const retrying = await tasks.enqueue(waiting, 'again')
    await untilState(app, waiting, retrying.id, 'retrying')
    for (const { id } of [delayed, retrying]) {
      const both = await Promise.all([tasks.cancel(waiting, id), tasks.cancel(waiting, id)])
      t.strictSame(both.toSorted(), [false, true])
      const record = await tasks.get(waiting, id)
      t.match(record, { state: 'skipped', finishedAt: String })
      t.notOk(record !== undefined && ('error' in record || 'result' in record))
      t.equal(await tasks.cancel(waiting, id), false, 'it has ended')
      t.equal(await tasks.retry(waiting, id), false, 'it has not failed')
    }
    t.match(await tasks.count(waiting), { pending: 0, delayed: 0, running: 0, retrying: 0, failed: 0 })
    t.strictSame((await tasks.find(waiting, { state: 'skipped' })).records.map(({ id }) => id).toSorted(), [delayed.id, retrying.id].toSorted())
    t.strictSame((await tasks.find(waiting, { state: 'failed' })).records, [])
    t.strictSame(await tasks.enqueue(waiting, 'same key', { key: 'k' }), { id: delayed.id, duplicate: false })
    await untilState(app, waiting, delayed.id, 'succeeded')
    t.strictSame(ran, ['again', 'same key'])
    t.equal(failures, 0)
    for (const odd of ODD_IDS) t.equal(await tasks.cancel(waiting, odd), false, odd.slice(0, 40))
    t.equal(await tasks.cancel(waiting, delayed.id), false, 'it has succeeded')
    if (engine === undefined) return
    const web = await onPlace(t, [defineTask({ name: 'waiting-elsewhere', handler () {} })], { worker: false })
    const elsewhere = defineTask({ name: 'waiting-elsewhere-2', handler () { ran.push('elsewhere') } })
    const other = await onPlace(t, [elsewhere], { worker: false })
    const receipts = await Promise.all([1, 2, 3].map(async () => await other.app.backgroundTasks.enqueue(elsewhere)))
    t.equal(await other.app.backgroundTasks.cancel(elsewhere, receipts[1]?.id ?? ''), true)
    t.match(await other.app.backgroundTasks.count(elsewhere), { pending: 2 })
    await onPlace(t, [elsewhere])
    await until(async () => await stateOf(other.app, elsewhere, receipts[2]?.id ?? '') === 'succeeded')
    t.equal(ran.filter(kind => kind === 'elsewhere').length, 2)
    await web.app.close()
  })

  await t.test('a job that runs is cancelled in whatever process it runs, within 5 s, and what its handler does changes nothing', async t => {
    if (!supports.cancel) return
    const gates = new Gates()
    const signals: AbortSignal[] = []
    const starts: string[] = []
    let failures = 0
    const running = defineTask({
      name: 'running',
      retry: { attempts: 3, backoff: { type: 'fixed', delay: 20 } },
      async handler (kind: string, { signal }) {
        starts.push(kind)
        if (kind === 'next') return
        signals.push(signal)
        if (kind === 'heeds') await new Promise<void>(resolve => { signal.addEventListener('abort', () => { resolve() }) })
        if (kind === 'succeeds' || kind === 'throws') await gates.wait(kind)
        if (kind === 'throws') throw new Error('no')
        if (kind === 'hangs') await new Promise(() => {})
      },
      onFailed () { failures++ }
    })
    const worker = await onPlace(t, [running], { worker: { concurrency: 1 } })
    const web = engine === undefined ? worker : await onPlace(t, [running], { worker: false })
    const tasks = web.app.backgroundTasks
    for (const kind of ['heeds', 'succeeds', 'throws', 'hangs']) {
      const { id } = await tasks.enqueue(running, kind)
      await until(() => starts.includes(kind))
      await untilState(web.app, running, id, 'running')
      const from = Date.now()
      t.equal(await tasks.cancel(running, id), true, kind)
      t.equal(await stateOf(web.app, running, id), 'skipped', `${kind}: from now on`)
      // A handler may end before it hears of it.
      gates.open(kind)
      if (kind === 'heeds' || kind === 'hangs') {
        const signal = signals.at(-1) as AbortSignal
        await until(() => signal.aborted)
        t.ok(Date.now() - from < 5_000, `${kind}: ${Date.now() - from} ms`)
        t.match(signal.reason, { code: 'FST_BGT_CANCELLED', message: 'The background task "running" was cancelled' })
      }
      const next = await tasks.enqueue(running, 'next')
      await untilState(web.app, running, next.id, 'succeeded')
      const record = await tasks.get(running, id)
      t.match(record, { state: 'skipped', attempt: 1, startedAt: String, finishedAt: String })
      t.notOk(record !== undefined && ('error' in record || 'result' in record), kind)
    }
    t.strictSame(starts, ['heeds', 'next', 'succeeds', 'next', 'throws', 'next', 'hangs', 'next'], 'none is repeated, and each frees its seat')
    t.equal(failures, 0)
    t.match(await tasks.count(running), { pending: 0, running: 0, retrying: 0, failed: 0 })
    t.match(worker.app.backgroundTasks.stats, { running: 0, pending: 0 })
  })

  await t.test('a job whose last onFailed runs can be cancelled, and a job may cancel itself', async t => {
    if (!supports.cancel) return
    const gates = new Gates()
    let isTold = false
    const failing = defineTask({
      name: 'failing',
      retry: { attempts: 1 },
      handler () { throw new Error('no') },
      async onFailed () { isTold = true; await gates.wait('told') }
    })
    const itself: AnyTaskDefinition = defineTask({ name: 'itself', async handler (_: undefined, { app, id }): Promise<boolean> { return await app.backgroundTasks.cancel(itself as never, id) } })
    const { app, logs } = await onPlace(t, [failing, itself])
    const tasks = app.backgroundTasks
    const { id } = await tasks.enqueue(failing)
    await until(() => isTold)
    t.equal(await tasks.cancel(failing, id), true)
    gates.open('told')
    await app.backgroundTasks.idle()
    t.equal(await stateOf(app, failing, id), 'skipped')
    const own = await tasks.enqueue(itself as never)
    await untilState(app, itself, own.id, 'skipped')
    await app.backgroundTasks.idle()
    t.match(app.backgroundTasks.stats, { pending: 0, running: 0 })
    t.notOk(logs.some(({ msg }) => msg.includes('could not be noted')))
  })

  await t.test('a delivered job whose task a subscriber cancels does not run, here or elsewhere', async t => {
    if (engine === undefined) return
    const starts: string[] = []
    const note = defineTask({ name: 'subscribed', handler (kind: string) { starts.push(kind) } })
    let seen = 0
    const onAdded = (message: unknown): void => {
      const { task } = message as TaskAddedMessage
      if (task.name === 'subscribed' && seen++ === 0) task.cancel()
    }
    const web = await onPlace(t, [note], { worker: false })
    const { id } = await web.app.backgroundTasks.enqueue(note, 'first')
    subscribe('fastify-background-tasks.added', onAdded)
    t.teardown(() => unsubscribe('fastify-background-tasks.added', onAdded))
    await onPlace(t, [note])
    await until(() => seen > 0)
    await web.app.backgroundTasks.enqueue(note, 'second')
    await until(() => starts.length > 0)
    t.strictSame(starts, ['second'])
    if (!supports.get) return
    await untilState(web.app, note, id, 'skipped')
    if (supports.count) t.match(await web.app.backgroundTasks.count(note), { running: 0, failed: 0 })
  })

  await t.test('result waits for the end of a task, and no longer than it may', async t => {
    const gates = new Gates()
    const waited = defineTask({
      name: 'waited',
      retry: { attempts: 1 },
      async handler (kind: string) {
        if (kind.startsWith('hang')) await gates.wait(kind)
        if (kind === 'fails') throw new Error('no')
        return { kind }
      }
    })
    const worker = await onPlace(t, [waited], { worker: { concurrency: 200 } })
    const web = engine === undefined ? worker : await onPlace(t, [waited], { worker: false })
    const tasks = web.app.backgroundTasks
    if (!supports.get) {
      await t.rejects(tasks.result(waited, UNKNOWN, { timeout: 10 }), { code: 'FST_BGT_UNSUPPORTED', message: /does not support "result"/ })
      return
    }
    const resultOf = async (kind: string, timeout: number): Promise<TaskRecord | undefined> => await tasks.result(waited, (await tasks.enqueue(waited, kind)).id, { timeout })
    t.match(await resultOf('ok', 10_000), { state: 'succeeded', result: { kind: 'ok' } })
    t.match(await resultOf('fails', 10_000), { state: 'failed', error: { message: 'no' } })
    const hundred = await Promise.all(Array.from({ length: 100 }, async (_, n) => await resultOf(`ok ${n}`, 20_000)))
    t.strictSame(hundred.map(record => record?.result), Array.from({ length: 100 }, (_, n) => ({ kind: `ok ${n}` })))
    const { id } = await tasks.enqueue(waited, 'hang 1')
    t.equal(await tasks.result(waited, id, { timeout: 0 }), undefined, 'one look')
    t.equal(await tasks.result(waited, id, { timeout: 60 }), undefined, 'the time is up')
    const both = [tasks.result(waited, id, { timeout: 20_000 }), tasks.result(waited, id, { timeout: 20_000 })]
    await untilState(web.app, waited, id, 'running')
    gates.open('hang 1')
    t.match(await Promise.all(both), [{ result: { kind: 'hang 1' } }, { result: { kind: 'hang 1' } }])
    t.match(await tasks.result(waited, id, { timeout: 0 }), { state: 'succeeded' })
    t.equal(await tasks.result(waited, UNKNOWN, { timeout: 20_000 }), undefined, 'nobody has this id')
    if (supports.cancel) {
      const { id: cancelled } = await tasks.enqueue(waited, 'later', { delay: 60_000 })
      const wait = tasks.result(waited, cancelled, { timeout: 20_000 })
      await tasks.cancel(waited, cancelled)
      t.match(await wait, { state: 'skipped' })
    }
    for (const [options, message] of [[{}, /"timeout" of result is required, and accepts milliseconds from 0 to 60000/], [{ timeout: -1 }, /0 to 60000/], [{ timeout: 60_001 }, /0 to 60000/], [{ timeout: '5' }, /0 to 60000/], [undefined, /result accepts an object/]] as const) {
      await t.rejects(tasks.result(waited, id, options as never), { code: 'FST_BGT_INVALID_OPTION', message })
    }
    const { id: hanging } = await tasks.enqueue(waited, 'hang 2')
    await untilState(web.app, waited, hanging, 'running')
    const cutOff = tasks.result(waited, hanging, { timeout: 60_000 })
    await sleep(50)
    const closed = web.app.close()
    t.equal(await cutOff, undefined, 'a close ends the wait')
    gates.open('hang 2')
    await closed
  })

  await t.test('health tells of the engine and of what this process runs; after a close the rest is refused', async t => {
    const one = defineTask({ name: 'healthy', handler () {} })
    const { app } = await onPlace(t, [one])
    const tasks = app.backgroundTasks
    await until(() => tasks.health().consuming.length > 0)
    t.match(tasks.health(), { connected: true, consuming: ['healthy'] })
    t.equal(tasks.health().engine === null, engine === undefined)
    if (engine !== undefined) {
      const web = await onPlace(t, [one], { worker: false })
      t.strictSame(web.app.backgroundTasks.health(), { engine: tasks.health().engine, connected: true, consuming: [] })
    }
    await app.close()
    t.strictSame(tasks.health().consuming, [])
    for (const [name, call] of Object.entries({
      count: () => tasks.count(one), find: () => tasks.find(one, { state: 'failed' }), retry: () => tasks.retry(one, UNKNOWN), cancel: () => tasks.cancel(one, UNKNOWN), result: () => tasks.result(one, UNKNOWN, { timeout: 1 })
    })) await t.rejects(call() as Promise<unknown>, { code: 'FST_BGT_CLOSED', message: `${name} was called after the app had closed` })
  })
}
