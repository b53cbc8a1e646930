/**
 * Every promise that holds in every placement, and every flag of `supports`: one suite for this process and each engine.
 * What a placement cannot do it has to refuse.
 */
import { AsyncLocalStorage } from 'node:async_hooks'
import { subscribe, unsubscribe } from 'node:diagnostics_channel'
import { setTimeout as sleep } from 'node:timers/promises'
import { Type } from '@sinclair/typebox'
import type { FastifyInstance, FastifyServerOptions } from 'fastify'
import { Piscina } from 'piscina'
import type { Test } from 'tap'
import t from 'tap'
import { declareTask, defineTask, type AnyTaskDefinition, type FastifyBackgroundTasksOptions, type TaskContextOptions, type TaskEngine, type TaskEnqueueMessage, type TaskRecord } from '../../lib/index.js'
import { start, type Started } from '../support/app.js'
import { operating } from './operating.js'

export interface PlacementUnderTest {
  readonly name: string
  /** A new adapter to one and the same place; undefined for this process. */
  readonly engine: (() => TaskEngine<unknown>) | undefined
  readonly supports: TaskEngine['supports']
  /** Stores a task without this package, as someone else's program does. Each engine has to have it. */
  readonly storeByHand?: (task: string, stored: StoredByHand) => Promise<unknown>
  readonly cleanUp?: () => Promise<unknown>
}

export interface StoredByHand {
  readonly payload: unknown
  readonly headers: Readonly<Record<string, unknown>>
  readonly requestId: string | number
}

const retryFast = { attempts: 3, backoff: { type: 'fixed', delay: 50 } } as const

/** Waits until it is so; a test that waits in vain is ended by its timeout. */
async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(10)
}

export function conformance (open: (t: Test) => Promise<PlacementUnderTest | undefined>): void {
  t.setTimeout(240_000)
  void t.test('conformance', { timeout: 240_000 }, async t => {
    const place = await open(t)
    if (place === undefined) return
    if (place.cleanUp !== undefined) t.teardown(place.cleanUp)
    const { supports, engine, storeByHand } = place
    const onPlace = async (t: Test, tasks: readonly AnyTaskDefinition[], options: FastifyBackgroundTasksOptions = {}, routes: (app: FastifyInstance) => void = () => {}, server: FastifyServerOptions = {}): Promise<Started> => {
      const started = await start(t, { tasks, ...engine !== undefined && { engine: engine() }, enqueueTimeout: 5_000, ...options }, server)
      routes(started.app)
      await started.app.ready()
      return started
    }
    const read = async <Payload, Result>(app: FastifyInstance, definition: Parameters<typeof app.backgroundTasks.get<Payload, Result>>[0], id: string): Promise<TaskRecord<Result> | undefined> =>
      supports.get ? await app.backgroundTasks.get(definition, id) : undefined
    const untilState = async (app: FastifyInstance, definition: AnyTaskDefinition, id: string, state: string): Promise<void> => {
      if (supports.get) await until(async () => (await read(app, definition as never, id))?.state === state)
    }

    await operating(t, place, onPlace)

    await t.test('a task that a request adds runs once, with its payload, and its result can be read', async t => {
      const ran: unknown[] = []
      const mail = defineTask({
        name: 'mail',
        payload: Type.Object({ to: Type.String({ format: 'email' }), at: Type.Optional(Type.String()), n: Type.Optional(Type.Integer({ default: 1 })) }),
        async handler (payload, { id, attempt, headers, requestId, signal }) {
          ran.push({ payload, id, attempt, traceparent: headers['traceparent'], requestId, aborted: signal.aborted })
          return { sent: payload.to, at: new Date(0) }
        }
      })
      const { app } = await onPlace(t, [mail], {}, app => app.post('/', async (request, reply) => {
        const { id } = request.backgroundTasks.addTask(mail, { to: 'ada@example.com' })
        return await reply.code(202).send({ id })
      }))
      const reply = await app.inject({ method: 'POST', url: '/', headers: { traceparent: '00-1-2-01' } })
      const { id } = reply.json<{ id: string }>()
      t.equal(reply.statusCode, 202)
      await until(() => ran.length > 0)
      await untilState(app, mail, id, 'succeeded')
      t.strictSame(ran, [{ payload: { to: 'ada@example.com', n: 1 }, id, attempt: 1, traceparent: '00-1-2-01', requestId: 'req-1', aborted: false }])
      if (supports.get) {
        const record = await read(app, mail, id)
        t.match(record, { id, name: 'mail', state: 'succeeded', attempt: 1, result: { sent: 'ada@example.com', at: '1970-01-01T00:00:00.000Z' } })
        const [added = NaN, started = NaN, finished = NaN] = [record?.enqueuedAt, record?.startedAt, record?.finishedAt].map(time => Date.parse(time ?? ''))
        t.ok(added <= started && started <= finished && Date.now() - added < 60_000, 'times are in order')
        t.equal(await read(app, mail, '00000000-0000-4000-8000-000000000000'), undefined)
      } else {
        await t.rejects(app.backgroundTasks.get(mail, id), { code: 'FST_BGT_UNSUPPORTED' })
      }
    })

    await t.test('several tasks of one request, and of many requests, each run once', async t => {
      const ran = new Map<number, number>()
      const one = defineTask({ name: 'one', handler (n: number) { ran.set(n, (ran.get(n) ?? 0) + 1) } })
      const two = defineTask({ name: 'two', handler (n: number) { ran.set(n, (ran.get(n) ?? 0) + 1) } })
      const { app } = await onPlace(t, [one, two], {}, app => app.get<{ Params: { n: string } }>('/:n', async request => {
        const n = 3 * Number(request.params.n)
        request.backgroundTasks.addTask(one, n)
        request.backgroundTasks.addTask(one, n + 1)
        request.backgroundTasks.addTask(two, n + 2)
      }))
      const replies = await Promise.all(Array.from({ length: 100 }, async (_, n) => (await app.inject(`/${n}`)).statusCode))
      t.ok(replies.every(status => status === 200))
      await until(() => ran.size === 300)
      t.ok([...ran.values()].every(times => times === 1))
    })

    await t.test('a failed request leaves no task behind, a refused payload neither', async t => {
      const ran: string[] = []
      const log = defineTask({ name: 'log', payload: Type.String(), handler (name) { ran.push(name) } })
      const { app } = await onPlace(t, [log], {}, app => app.get('/', async request => {
        request.backgroundTasks.addTask(log, 'success')
        request.backgroundTasks.with({ when: 'error' }).addTask(log, 'error')
        request.backgroundTasks.addTask(log, 7 as never)
      }))
      t.match((await app.inject('/')).json(), { code: 'FST_BGT_INVALID_PAYLOAD' })
      await until(() => ran.length > 0)
      await app.backgroundTasks.enqueue(log, 'last')
      await until(() => ran.includes('last'))
      t.strictSame(ran, ['error', 'last'])
    })

    await t.test('a failed attempt starts again behind its backoff; behind the last one the job has failed', async t => {
      const starts: Array<[attempt: number, at: number]> = []
      const told: unknown[] = []
      const doomed = defineTask({
        name: 'doomed',
        retry: { attempts: 3, backoff: { type: 'fixed', delay: 200 } },
        async handler (_: { n: number }, { attempt }) {
          starts.push([attempt, Date.now()])
          throw Object.assign(new RangeError(`no ${attempt}`), { code: 'E_NO' })
        },
        onFailed (payload, error, { attempts }) { told.push([payload, (error as Error).message, attempts]) }
      })
      const { app, logs } = await onPlace(t, [doomed])
      const { id } = await app.backgroundTasks.enqueue(doomed, { n: 1 })
      await until(() => starts.length === 1)
      await untilState(app, doomed, id, 'retrying')
      if (supports.get) t.match(await read(app, doomed, id), { attempt: 1, error: { name: 'RangeError', message: 'no 1', code: 'E_NO' } })
      await until(() => told.length > 0)
      await untilState(app, doomed, id, 'failed')
      t.strictSame(starts.map(([attempt]) => attempt), [1, 2, 3])
      starts.forEach(([, at], i) => { if (i > 0) t.ok(at - (starts[i - 1]?.[1] ?? 0) >= 195, `backoff ${i}: ${at - (starts[i - 1]?.[1] ?? 0)} ms`) })
      t.strictSame(told, [[{ n: 1 }, 'no 3', 3]])
      if (supports.get) t.match(await read(app, doomed, id), { state: 'failed', attempt: 3, error: { name: 'RangeError', message: 'no 3', code: 'E_NO' } })
      t.match(logs.filter(({ level }) => level >= 40), [{ level: 40 }, { level: 40 }, { level: 50, msg: 'background task failed', task: { id, name: 'doomed' } }])
    })

    await t.test('retry.when false ends it at once; a timeout is a failed attempt; a retry does not hold up others', async t => {
      const starts: string[] = []
      const picky = defineTask({ name: 'picky', retry: { ...retryFast, when: () => false }, handler () { starts.push('picky'); throw new Error('final') } })
      const slow = defineTask({
        name: 'slow', timeout: 100, retry: retryFast, async handler (_: undefined, { attempt }) { starts.push(`slow ${attempt}`); if (attempt === 1) await new Promise(() => {}) }
      })
      const { app } = await onPlace(t, [picky, slow], { worker: { concurrency: 1 } })
      const { id } = await app.backgroundTasks.enqueue(picky)
      const { id: slowId } = await app.backgroundTasks.enqueue(slow)
      await until(() => starts.includes('slow 2'))
      await untilState(app, picky, id, 'failed')
      await untilState(app, slow, slowId, 'succeeded')
      t.strictSame(starts.sort(), ['picky', 'slow 1', 'slow 2'])
      if (supports.get) t.match(await read(app, picky, id), { state: 'failed', attempt: 1, error: { message: 'final' } })
    })

    await t.test('a delayed task starts when its time has come', async t => {
      const ran: string[] = []
      const log = defineTask({ name: 'log-delayed', handler (name: string) { ran.push(name) } })
      const { app } = await onPlace(t, [log])
      if (!supports.delay) {
        await t.rejects(app.backgroundTasks.enqueue(log, 'late', { delay: 1 }), { code: 'FST_BGT_UNSUPPORTED' })
        return
      }
      const from = Date.now()
      const { id } = await app.backgroundTasks.enqueue(log, 'late', { delay: 400 })
      await app.backgroundTasks.enqueue(log, 'at once')
      await untilState(app, log, id, 'delayed')
      if (supports.get) t.match(await read(app, log, id), { attempt: 0 })
      await until(() => ran.includes('late'))
      const took = Date.now() - from
      t.strictSame(ran, ['at once', 'late'])
      t.ok(took >= 395, `not before: ${took} ms`)
    })

    await t.test('a key: of ten at once one is new, and its record answers for all, also when it has ended', async t => {
      const ran: string[] = []
      const charge = defineTask({ name: 'charge', handler (order: string) { ran.push(order) } })
      const { app } = await onPlace(t, [charge], {}, app => app.get('/', async request =>
        ({ id: request.backgroundTasks.addTask(charge, 'order', { key: '1' }).id })))
      if (!supports.key) {
        await t.rejects(app.backgroundTasks.enqueue(charge, 'order', { key: '1' }), { code: 'FST_BGT_UNSUPPORTED' })
        return
      }
      const receipts = await Promise.all(Array.from({ length: 10 }, async () => await app.backgroundTasks.enqueue(charge, 'order', { key: '1' })))
      t.equal(receipts.filter(({ duplicate }) => !duplicate).length, 1)
      t.equal(new Set(receipts.map(({ id }) => id)).size, 1)
      const id = receipts[0]?.id ?? ''
      await until(() => ran.length > 0)
      await untilState(app, charge, id, 'succeeded')
      t.strictSame(await app.backgroundTasks.enqueue(charge, 'order', { key: '1' }), { id, duplicate: true })
      t.strictSame((await app.inject('/')).json(), { id }, 'a repeated webhook')
      await app.backgroundTasks.enqueue(charge, 'another', { key: '2' })
      await until(() => ran.includes('another'))
      t.strictSame(ran, ['order', 'another'])
    })

    if (!supports.tx) {
      await t.test('a transaction is refused', async t => {
        const task = defineTask({ name: 'tx', handler () {} })
        const { app } = await onPlace(t, [task])
        await t.rejects(app.backgroundTasks.enqueue(task, undefined, { tx: { executeSql: async () => ({}) } }), { code: 'FST_BGT_UNSUPPORTED' })
      })
    }

    await t.test('what is not in time at shutdown is named in the log, or goes back and starts again as the same attempt', async t => {
      const starts: number[] = []
      let hangs = true
      const long = defineTask({ name: 'long', async handler (_: undefined, { attempt }) { starts.push(attempt); if (hangs) await new Promise(() => {}) } })
      const first = await onPlace(t, [long], { closeTimeout: 100 })
      const { id } = await first.app.backgroundTasks.enqueue(long)
      await until(() => starts.length === 1)
      await first.app.close()
      if (engine === undefined) {
        t.match(first.logs.at(-1), { level: 50, tasks: [{ id, name: 'long' }] })
        return
      }
      t.strictSame(first.logs.filter(({ level }) => level >= 50), [])
      hangs = false
      const second = await onPlace(t, [long])
      await until(() => starts.length === 2)
      t.strictSame(starts, [1, 1])
      await untilState(second.app, long, id, 'succeeded')
    })

    if (engine === undefined || storeByHand === undefined) return

    await t.test('web and worker are the same app: the one stores, the other runs, so many at once', async t => {
      let running = 0
      let most = 0
      let ran = 0
      const work = defineTask({ name: 'work', async handler () { most = Math.max(most, ++running); await sleep(5); running--; ran++ } })
      const other = defineTask({ name: 'other', handler () {} })
      const web = await onPlace(t, [work, other], { worker: false })
      for (let i = 0; i < 30; i++) await web.app.backgroundTasks.enqueue(work)
      const { id } = await web.app.backgroundTasks.enqueue(other)
      await sleep(50)
      t.equal(ran, 0)
      // It does not know the other definition, and leaves its jobs where they are.
      const worker = await onPlace(t, [work], { worker: { concurrency: 3 } })
      await until(() => ran === 30)
      t.ok(most <= 3 && most > 1, `${most} at once`)
      if (supports.get) t.match(await read(web.app, other, id), { state: 'pending', attempt: 0 })
      t.match(worker.app.backgroundTasks.stats, { enqueued: 0 })
      t.match(web.app.backgroundTasks.stats, { enqueued: 31 })
    })

    await t.test('each header that is a text reaches the handler, whatever other headers there are; a request id that is a number does as a text', async t => {
      const ran: unknown[] = []
      const note = defineTask({ name: 'note', handler (by: string, { headers, requestId }) { ran.push([by, headers, requestId]) } })
      const odd = { n: 7, yes: true, nested: { a: 'b' } }
      const addOdd = (message: unknown): void => { Object.assign((message as TaskEnqueueMessage).headers, { tenant: 'a', ...odd }) }
      subscribe('fastify-background-tasks.enqueue', addOdd)
      t.teardown(() => { unsubscribe('fastify-background-tasks.enqueue', addOdd) })
      const { app } = await onPlace(t, [note], {}, app => app.get('/', async request => { request.backgroundTasks.addTask(note, 'a request') }), { genReqId: () => 7 as unknown as string })
      const reply = await app.inject({ url: '/', headers: { traceparent: '00-1-2-01' } })
      t.equal(reply.statusCode, 200)
      await until(() => ran.length === 1)
      await storeByHand('note', { payload: 'by hand', headers: { traceparent: '00-1-2-01', ...odd, tenant: 'a' }, requestId: 7 })
      await until(() => ran.length === 2)
      const headers = { traceparent: '00-1-2-01', tenant: 'a' }
      t.strictSame(ran, [['a request', headers, '7'], ['by hand', headers, '7']])
    })

    await t.test('a process that declares a task only stores it; its file runs in a thread elsewhere, and the value of a request travels', async t => {
      const tenants = new AsyncLocalStorage<string>()
      const context: TaskContextOptions = { capture: request => request.headers['x-tenant'], restore: (tenant: string, run) => tenants.run(tenant, run) }
      const ran: unknown[] = []
      const told = declareTask<string>({ name: 'told', retry: { attempts: 2, backoff: { type: 'fixed', delay: 20 } } })
      const file = declareTask<{ do?: string }>({ name: 'file' })
      const tasks = [
        told.handledBy((what, { attempt }) => {
          ran.push([what, attempt, tenants.getStore()])
          throw new Error('no')
        }, { onFailed (what) { ran.push([what, 'failed', tenants.getStore()]) } }),
        file.handledBy(new URL('../support/threads/work.js', import.meta.url))
      ]
      const pool = new Piscina({ maxThreads: 1 })
      t.teardown(() => pool.destroy())
      const add = (app: FastifyInstance): unknown => app.get('/', async request => [request.backgroundTasks.addTask(told, 'a "ü\u0000"').id, request.backgroundTasks.addTask(file, {}).id])
      const web = engine === undefined ? undefined : await onPlace(t, [told, file], { context, worker: { concurrency: 3 } }, add)
      const worker = await onPlace(t, tasks, { context, threads: pool }, web === undefined ? add : undefined)
      const tenant = 'ü \ud83d "\u0001'
      const reply = await (web ?? worker).app.inject({ url: '/', headers: { 'x-tenant': tenant } })
      await until(() => ran.length === 3)
      t.strictSame(ran, [1, 2, 'failed'].map(attempt => ['a "ü\u0000"', attempt, tenant]))
      const [, id = ''] = reply.json<string[]>()
      await untilState(worker.app, file, id, 'succeeded')
      if (supports.get) t.match(await read((web ?? worker).app, file, id), { result: { context: { id, attempt: 1 } } }, 'the process that only stores reads the record')
      else await until(() => pool.completed === 1)
      if (web !== undefined) t.match(web.app.backgroundTasks.stats, { enqueued: 2, succeeded: 0, failed: 0 })
    })

    await t.test('a job that was stored sees nothing of the request that stored it, though it runs in the same process', async t => {
      const requests = new AsyncLocalStorage<string>()
      const seen: unknown[] = []
      const look = defineTask({ name: 'look', handler () { seen.push(requests.getStore()) } })
      const { app } = await onPlace(t, [look])
      const worker = await onPlace(t, [look])
      for (let i = 1; i <= 3; i++) {
        await requests.run('a request', async () => await app.backgroundTasks.enqueue(look))
        await until(() => seen.length === i)
        if (i === 2) await worker.app.close()
      }
      t.strictSame(seen, Array(3).fill(engine === undefined ? 'a request' : undefined))
    })

    await t.test('a shutdown under load loses nothing and runs nothing twice', async t => {
      const ran = new Map<number, number>()
      const work = defineTask({ name: 'load', async handler (n: number) { await sleep(2); ran.set(n, (ran.get(n) ?? 0) + 1) } })
      const first = await onPlace(t, [work], { worker: { concurrency: 20 } })
      const replies = await Promise.all(Array.from({ length: 300 }, async (_, n) => await first.app.backgroundTasks.enqueue(work, n)))
      t.equal(replies.length, 300)
      await until(() => ran.size > 20)
      await first.app.close()
      const atClose = ran.size
      await onPlace(t, [work])
      await until(() => ran.size === 300)
      t.ok(atClose <= 300)
      t.ok([...ran.values()].every(times => times === 1))
    })

    await t.test('an idle worker starts a job soon', async t => {
      const started: number[] = []
      const ping = defineTask({ name: 'ping', handler () { started.push(Date.now()) } })
      const web = await onPlace(t, [ping], { worker: false })
      await onPlace(t, [ping])
      await sleep(300)
      const waits: number[] = []
      for (let i = 1; i <= 5; i++) {
        const from = Date.now()
        await web.app.backgroundTasks.enqueue(ping)
        await until(() => started.length === i)
        waits.push((started[i - 1] ?? 0) - from)
      }
      t.comment(`milliseconds: ${waits.join(', ')}`)
      t.ok(Math.min(...waits) < 1_500)
    })
  })
}
