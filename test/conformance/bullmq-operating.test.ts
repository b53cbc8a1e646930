/** Jobs of the BullMQ engine that somebody cancels, finds and puts back: in other processes, with BullMQ's own tools, and at the same time. */
import { setTimeout as sleep } from 'node:timers/promises'
import { FlowProducer, Queue, Worker, type Job } from 'bullmq'
import { Redis } from 'ioredis'
import t, { type Test } from 'tap'
import { bullmq } from '../../lib/engines/bullmq/index.js'
import { defineTask, type AnyTaskDefinition, type JobState, type TaskRecord } from '../../lib/index.js'
import { deferred, start, type Started } from '../support/app.js'
import { opened } from '../support/opened.js'
import { openRedis } from '../support/redis.js'
import { redisServer } from '../support/servers.js'
import { startService } from '../support/services.js'
import { LEAST_RIGHTS } from '../support/topologies/redis.js'

t.setTimeout(240_000)

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(10)
}

interface Place {
  readonly connection: string
  readonly prefix: string
  readonly redis: Redis
  /** An app with this definition. */
  readonly open: (definition: AnyTaskDefinition, isWorker?: boolean, worker?: object) => Promise<Started>
  readonly queueOf: (definition: AnyTaskDefinition) => Queue
}

async function place (t: Test): Promise<Place | undefined> {
  const found = await openRedis(t)
  if (found === undefined) return undefined
  const { connection, prefix } = found
  const redis = new Redis(connection)
  t.teardown(() => { redis.disconnect() })
  return {
    connection,
    prefix,
    redis,
    open: async (definition, isWorker = true, worker = {}) => {
      const started = await start(t, { tasks: [definition], engine: bullmq({ connection, prefix, options: { worker } }), worker: isWorker && undefined })
      await started.app.ready()
      return started
    },
    queueOf: definition => {
      const queue = new Queue(definition.name, { connection: { url: connection }, prefix, skipMetasUpdate: true })
      t.teardown(() => queue.close())
      return queue
    }
  }
}

type FoundRecord = TaskRecord<unknown> & { readonly payload?: unknown }

async function recordOf ({ app }: Started, definition: AnyTaskDefinition, id: string): Promise<TaskRecord<unknown> | undefined> {
  return await app.backgroundTasks.get(definition as never, id)
}

async function untilState (started: Started, definition: AnyTaskDefinition, id: string, state: JobState): Promise<void> {
  await until(async () => (await recordOf(started, definition, id))?.state === state)
}

/** What an app has logged that somebody would look at. */
function trouble (...all: Started[]): unknown[] {
  return all.flatMap(({ logs }) => logs).filter(({ level }) => level >= 40)
}

t.test('a cancelled job whose process is killed does not start again; neither does one whose process shuts down', async t => {
  const found = await place(t)
  if (found === undefined) return
  const { connection, prefix, open, queueOf } = found
  const note = defineTask({ name: 'note', async handler (_payload: { n: number, ms: number }) {} })
  const web = await open(note, false)
  for (const how of ['kill', 'stop'] as const) {
    const service = await startService(t, { engine: 'bullmq', options: { connection, prefix, options: { worker: { stalledInterval: 100, lockDuration: 1_000 } } }, isWorker: true })
    const { id } = await web.app.backgroundTasks.enqueue(note, { n: 1, ms: 5_000 })
    await until(() => service.started.length === 1)
    t.equal(await web.app.backgroundTasks.cancel(note, id), true)
    if (how === 'kill') await service.kill()
    const other = await startService(t, { engine: 'bullmq', options: { connection, prefix, options: { worker: { stalledInterval: 100, lockDuration: 1_000 } } }, isWorker: true })
    if (how === 'stop') await service.stop()
    const next = await web.app.backgroundTasks.enqueue(note, { n: 2, ms: 0 })
    await untilState(web, note, next.id, 'succeeded')
    // By then a job whose process died has started again.
    await sleep(how === 'kill' ? 2_500 : 0)
    t.notOk(other.started.some(({ n }) => n === 1), how)
    t.match(await recordOf(web, note, id), { state: 'skipped', attempt: 1 })
    t.strictSame(await queueOf(note).getJobCounts('active', 'wait', 'delayed', 'failed'), { active: 0, wait: 0, delayed: 0, failed: how === 'kill' ? 1 : 2 })
    t.strictSame(other.lines, [])
    await other.stop()
  }
})

t.test('a job that is returned to the engine after it was cancelled stays skipped', async t => {
  const found = await place(t)
  if (found === undefined) return
  const starts: string[] = []
  const slow = defineTask({ name: 'slow', async handler (name: string) { starts.push(name); if (name === 'slow') await new Promise(() => {}) } })
  const web = await found.open(slow, false)
  const { logs, app: worker } = await start(t, { tasks: [slow], engine: bullmq({ connection: found.connection, prefix: found.prefix, options: { worker: { lockRenewTime: 3_000 } } }), closeTimeout: 100 })
  await worker.ready()
  const { id } = await web.app.backgroundTasks.enqueue(slow, 'slow')
  await until(() => starts.length === 1)
  t.equal(await web.app.backgroundTasks.cancel(slow, id), true)
  await worker.close()
  t.match(await recordOf(web, slow, id), { state: 'skipped' })
  await found.open(slow)
  const next = await web.app.backgroundTasks.enqueue(slow, 'next')
  await untilState(web, slow, next.id, 'succeeded')
  t.strictSame(starts, ['slow', 'next'])
  t.notOk(logs.some(({ msg }) => /lock/i.test(msg)))
})

t.test('a cancelled job that is put back with BullMQ\'s own tools runs again, with all its attempts, wherever it was cancelled', async t => {
  const found = await place(t)
  if (found === undefined) return
  const starts: number[] = []
  let hangs = true
  const job = defineTask({
    name: 'put-back',
    retry: { attempts: 3, backoff: { type: 'fixed', delay: 10 } },
    async handler (_: unknown, { attempt, signal }) {
      starts.push(attempt)
      if (hangs && attempt === 2) await new Promise<void>(resolve => { signal.addEventListener('abort', () => { resolve() }) })
      throw new Error('no')
    }
  })
  const web = await found.open(job, false)
  const queue = found.queueOf(job)
  const ways: Record<string, (job: Job) => Promise<unknown>> = {
    'the button of bull-board': async job => { await job.retry() },
    'with resetAttemptsMade': async job => { await job.retry('failed', { resetAttemptsMade: true, resetAttemptsStarted: true }) },
    'queue.retryJobs()': async () => { await queue.retryJobs() }
  }
  for (const [name, putBack] of Object.entries(ways)) {
    hangs = true
    const { id } = await web.app.backgroundTasks.enqueue(job)
    t.equal(await web.app.backgroundTasks.cancel(job, id), true)
    t.match(await recordOf(web, job, id), { state: 'skipped', attempt: 0 })
    await putBack(await queue.getJob(id) as Job)
    t.match(await recordOf(web, job, id), { state: 'pending', attempt: 0 }, name)
    const worker = await found.open(job)
    await until(async () => starts.length === 2 && (await recordOf(web, job, id))?.state === 'running')
    t.equal(await web.app.backgroundTasks.cancel(job, id), true)
    t.match(await recordOf(web, job, id), { state: 'skipped', attempt: 2 })
    await until(() => worker.app.backgroundTasks.stats.running === 0)
    hangs = false
    await putBack(await queue.getJob(id) as Job)
    await untilState(web, job, id, 'failed')
    t.strictSame(starts.splice(0), [1, 2, 1, 2, 3], name)
    t.match(await recordOf(web, job, id), { state: 'failed', attempt: 3, error: { message: 'no' } })
    t.equal(await web.app.backgroundTasks.cancel(job, id), false, 'it has ended')
    t.match(await web.app.backgroundTasks.count(job), { failed: 1 })
    t.equal(await web.app.backgroundTasks.retry(job, id), true)
    await until(() => starts.length === 3)
    t.strictSame(starts.splice(0), [1, 2, 3])
    await worker.app.close()
    await queue.clean(0, 0, 'failed')
  }
})

t.test('the key of a cancelled job is free, also while its handler still runs in the same process', async t => {
  const found = await place(t)
  if (found === undefined) return
  const ended: string[] = []
  const aborted: string[] = []
  const keyed = defineTask({
    name: 'keyed',
    async handler (name: string, { signal }) {
      signal.addEventListener('abort', () => { aborted.push(name) })
      await sleep(name === 'long' ? 3_000 : 300)
      ended.push(name)
    }
  })
  // A lock that is not renewed is lost after a second.
  const worker = await found.open(keyed, true, { lockDuration: 1_000, lockRenewTime: 300, stalledInterval: 100 })
  const web = await found.open(keyed, false)
  const tasks = web.app.backgroundTasks
  const first = await tasks.enqueue(keyed, 'first', { key: 'k' })
  await untilState(web, keyed, first.id, 'running')
  t.equal(await tasks.cancel(keyed, first.id), true)
  const stores = await Promise.all([1, 2, 3].map(async () => await tasks.enqueue(keyed, 'long', { key: 'k' })))
  t.strictSame(stores.map(({ duplicate }) => duplicate).sort(), [false, true, true])
  t.ok(stores.every(({ id }) => id === first.id))
  await until(() => ended.includes('long'))
  await untilState(web, keyed, first.id, 'succeeded')
  t.match(await recordOf(web, keyed, first.id), { attempt: 1 })
  t.strictSame([aborted, ended], [['first'], ['first', 'long']], 'the one was cancelled, the other ran once')
  t.match(await tasks.count(keyed), { pending: 0, running: 0, failed: 0 })
  t.strictSame(trouble(worker, web), [])
})

t.test('cancelled jobs for BullMQ itself: they have failed, and nothing of them is left elsewhere', async t => {
  const found = await place(t)
  if (found === undefined) return
  const { connection, prefix, open, queueOf, redis } = found
  const odd = defineTask({ name: 'odd', handler () {} })
  const web = await open(odd, false)
  const queue = queueOf(odd)
  await queue.add('odd', 1, { jobId: 'waiting-job' })
  await queue.add('odd', 1, { jobId: 'prioritized-job', priority: 3 })
  await queue.add('odd', 1, { jobId: 'delayed-job', delay: 60_000 })
  await queue.add('odd', 1, { jobId: 'deduplicated-job', deduplication: { id: 'd' } })
  const flows = new FlowProducer({ connection: { url: connection }, prefix })
  t.teardown(() => flows.close())
  await flows.add({ name: 'odd', queueName: 'odd', opts: { jobId: 'parent-job' }, children: [{ name: 'odd', queueName: 'odd', opts: { jobId: 'child-job' } }] })
  const worker = new Worker('odd', undefined, { connection: { url: connection }, prefix, autorun: false })
  t.teardown(() => worker.close())
  await queue.add('odd', 1, { jobId: 'active-job', lifo: true })
  await worker.getNextJob('token')
  await queue.pause()
  await queue.add('odd', 1, { jobId: 'paused-job' })

  for (const id of ['waiting-job', 'prioritized-job', 'delayed-job', 'deduplicated-job', 'child-job', 'active-job', 'paused-job']) {
    t.equal(await web.app.backgroundTasks.cancel(odd, id), true, id)
    t.match(await recordOf(web, odd, id), { state: 'skipped' }, id)
    const job = await queue.getJob(id) as Job
    t.equal(await job.getState(), 'failed', id)
    t.match(job, { failedReason: 'FastifyError: It was cancelled', finishedOn: Number, returnvalue: null })
  }
  t.equal(await queue.getJobState('parent-job'), 'waiting', 'a parent does not wait for a cancelled child')
  t.equal(await web.app.backgroundTasks.cancel(odd, 'parent-job'), true)
  t.strictSame(await queue.getJobCounts('wait', 'active', 'delayed', 'prioritized', 'waiting-children', 'completed', 'failed'),
    { wait: 0, active: 0, delayed: 0, prioritized: 0, 'waiting-children': 0, completed: 0, failed: 8 })
  t.not((await queue.add('odd', 1, { jobId: 'next-job', deduplication: { id: 'd' } })).id, 'deduplicated-job')
  t.equal(await redis.exists(`${prefix}:odd:active-job:lock`), 0)
  t.ok(await redis.pttl(`${prefix}:odd~skipped`) > 0, 'what the engine remembers of them goes with their records')
  t.match((await redis.xrevrange(`${prefix}:odd:events`, '+', '-')).filter(([, fields]) => fields.includes('failed')).length, 8)
  const scheduled = (await queue.upsertJobScheduler('schedule', { every: 60_000 }, { name: 'odd' }))?.id ?? ''
  t.match(await recordOf(web, odd, scheduled), { id: scheduled })
  t.equal(await web.app.backgroundTasks.cancel(odd, scheduled), false, 'the schedule would end with it')
  await queue.clean(0, 0, 'failed')
  t.strictSame((await web.app.backgroundTasks.find(odd, { state: 'skipped' })).records, [])
  t.match(await web.app.backgroundTasks.count(odd), { failed: 0 })
})

t.test('pages: equal times, jobs by hand, and what they leave out; each record is the one that get reads', async t => {
  const found = await place(t)
  if (found === undefined) return
  const { open, queueOf, redis, prefix } = found
  const many = defineTask({ name: 'many', keep: { succeeded: 600, failed: 600 }, handler () {} })
  const web = await open(many, false)
  const tasks = web.app.backgroundTasks
  const queue = queueOf(many)
  const ids = Array.from({ length: 6_000 }, (_, n) => `job-${String(n).padStart(4, '0')}`)
  const now = Date.now()
  await queue.addBulk(ids.map((jobId, n) => ({ name: 'many', data: { payload: n }, opts: { jobId, timestamp: now - Math.floor(n / 900) } })))
  const hostile = { 'no-time': {}, text: { timestamp: 'yesterday' }, far: { timestamp: '9e99' }, nan: { timestamp: 'nan' }, fraction: { timestamp: '1000.75' }, empty: { timestamp: '' }, before: { timestamp: '-5000' } }
  for (const [id, fields] of Object.entries(hostile)) {
    await redis.hset(`${prefix}:many:${id}`, { name: 'many', data: '{broken', ...fields })
    await redis.lpush(`${prefix}:many:wait`, id)
  }
  await redis.lpush(`${prefix}:many:wait`, 'nothing', 'meta')
  const read = async (state: JobState, limit: number): Promise<FoundRecord[]> => {
    const all: FoundRecord[] = []
    let after: string | undefined
    do {
      const page = await tasks.find(many, { state, limit, after, payload: true })
      all.push(...page.records)
      after = page.next
    } while (after !== undefined)
    return all
  }
  const order = (a: TaskRecord<unknown>, b: TaskRecord<unknown>): number => Date.parse(b.enqueuedAt) - Date.parse(a.enqueuedAt) || (a.id < b.id ? 1 : -1)
  const pending = await read('pending', 400)
  t.equal(pending.length, 6_000 + 6)
  t.strictSame(pending, pending.toSorted(order))
  t.equal(new Set(pending.map(({ id }) => id)).size, 6_006, 'none comes twice')
  t.strictSame(pending.find(({ id }) => id === 'job-0007')?.payload, 7)
  t.strictSame(pending.find(({ id }) => id === 'far')?.payload, '{broken')
  for (const id of ['job-0000', 'fraction', 'far', 'before']) {
    const { payload, ...record } = pending.find(record => record.id === id) as FoundRecord
    t.strictSame(record, await recordOf(web, many, id))
  }
  for (const id of ids.slice(0, 5)) await tasks.cancel(many, id)
  t.strictSame((await tasks.find(many, { state: 'skipped' })).records.map(({ id }) => id), ids.slice(0, 5).reverse())

  // The order in which they fail is another one.
  await redis.del(`${prefix}:many:wait`)
  await redis.zadd(`${prefix}:many:failed`, ...ids.slice(5).flatMap((id, n) => [now - (n * 7919) % 50_000, id]))
  const failed = await read('failed', 500)
  t.equal(failed.length, 5_995)
  t.strictSame(failed, failed.toSorted(order))
  t.match(await tasks.count(many), { failed: 5_995 })
  t.equal(await redis.exists(`${prefix}:many~order`), 1, 'so many are read in a stored order')

  const newest = async (): Promise<string | undefined> => (await tasks.find(many, { state: 'failed', limit: 1 })).records[0]?.id
  for (const [id, failedAt] of [['later', Date.now()], ['told late', now - 30_000]] as const) {
    await redis.hset(`${prefix}:many:${id}`, { name: 'many', data: '{}', timestamp: Date.now() })
    await redis.zadd(`${prefix}:many:failed`, failedAt, id)
    t.equal(await newest(), id)
    t.equal(await tasks.retry(many, id), true)
    t.not(await newest(), id, 'it is not there any more')
  }
  await redis.zadd(`${prefix}:many:failed`, ...ids.slice(100, 200).flatMap(id => [now - 601_000, id]))
  t.equal((await read('failed', 500)).length, 5_895, 'expired records are not there')
  t.match(await tasks.count(many), { failed: 5_895 })
  t.equal(await tasks.retry(many, ids[150] ?? ''), false)
})

t.test('many at once: of those who put a job back or cancel it, one is told so, and it ends in one state', async t => {
  const found = await place(t)
  if (found === undefined) return
  const runs = new Map<string, number>()
  const raced = defineTask({
    name: 'raced',
    retry: { attempts: 2, backoff: { type: 'fixed', delay: 1 } },
    async handler ({ n }: { n: number }, { id }) {
      runs.set(id, (runs.get(id) ?? 0) + 1)
      await sleep(n % 4)
      if (n % 2 === 0) throw new Error('no')
    }
  })
  const workers = [await found.open(raced), await found.open(raced)]
  const web = await found.open(raced, false)
  const tasks = web.app.backgroundTasks
  const told: Record<string, number> = {}
  for (let n = 0; n < 200; n++) {
    const { id } = await tasks.enqueue(raced, { n }, { key: `k${n}` })
    if (n % 3 === 0) await sleep(n % 7)
    const calls = await Promise.all([tasks.cancel(raced, id), tasks.retry(raced, id), tasks.cancel(raced, id), tasks.retry(raced, id)])
    const cancels = [calls[0], calls[2]].filter(Boolean).length
    if (calls[1] !== true && calls[3] !== true) t.ok(cancels <= 1, `${n}: ${String(calls)}`)
    let record: TaskRecord<unknown> | undefined
    await until(async () => ['succeeded', 'failed', 'skipped'].includes((record = await recordOf(web, raced, id))?.state ?? ''))
    if (cancels === 1 && calls[1] !== true && calls[3] !== true) t.equal(record?.state, 'skipped', `${n}`)
    if (cancels === 0) t.equal(record?.state, n % 2 === 0 ? 'failed' : 'succeeded', `${n}`)
    told[record?.state ?? ''] = (told[record?.state ?? ''] ?? 0) + 1
    if (record?.state === 'failed') {
      const again = await Promise.all([tasks.retry(raced, id), tasks.retry(raced, id), tasks.cancel(raced, id)])
      t.equal([again[0], again[1]].filter(Boolean).length, 1, `${n}: ${String(again)}`)
      await until(async () => ['failed', 'skipped'].includes((record = await recordOf(web, raced, id))?.state ?? ''))
      if (again[2]) t.equal(record.state, 'skipped')
    }
    if (record?.state === 'skipped') t.strictSame((await Promise.all([1, 2].map(async () => await tasks.enqueue(raced, { n: 1 }, { key: `k${n}` })))).map(({ duplicate }) => duplicate).sort(), [false, true], `${n}`)
  }
  t.comment(JSON.stringify(told))
  await until(async () => {
    const { pending, running, retrying, delayed } = await tasks.count(raced)
    return pending + (running ?? 0) + (retrying ?? 0) + (delayed ?? 0) === 0
  })
  await until(() => workers.every(({ app }) => app.backgroundTasks.stats.running === 0))
  t.strictSame(trouble(...workers, web).filter(line => !/has failed|failed/.test((line as { msg: string }).msg)), [])
})

t.test('while somebody waits for a result the stream of events keeps more entries, so that none is missed; afterwards as many as before', async t => {
  const found = await place(t)
  if (found === undefined) return
  const { open, queueOf, redis } = found
  const told = deferred()
  const task = defineTask({ name: 'waited', handler: async (_payload: null) => { await told.promise } })
  const { app } = await open(task)
  const kept = async (): Promise<string | null> => await redis.hget(queueOf(task).toKey('meta'), 'opts.maxLenEvents')
  t.equal(await kept(), '10')
  const { id } = await app.backgroundTasks.enqueue(task, null)
  const waiting = app.backgroundTasks.result(task, id, { timeout: 10_000 })
  await until(async () => await kept() === '1000')
  told.resolve()
  t.match(await waiting, { state: 'succeeded' })
  await app.close()
  t.equal(await kept(), '10')
})

t.test('with the least rights that the documents name, and while the server is away', async t => {
  const server = await opened(t, 'redis-server', () => redisServer())
  if (server === undefined) return
  t.teardown(() => server.remove())
  await server.start()
  const admin = new Redis(server.url)
  t.teardown(() => { admin.disconnect() })
  admin.on('error', () => {})
  const addUser = async (): Promise<unknown> => await admin.acl('SETUSER', 'jobs', 'on', '>secret', ...LEAST_RIGHTS.split(' '))
  await addUser()
  const gates = new Map<string, () => void>()
  const small = defineTask({
    name: 'small',
    retry: { attempts: 1 },
    async handler (name: string, { signal }) {
      if (name === 'hangs') await new Promise<void>(resolve => { signal.addEventListener('abort', () => { gates.get('aborted')?.(); resolve() }) })
      throw new Error('no')
    }
  })
  const url = new URL(server.url)
  Object.assign(url, { username: 'jobs', password: 'secret' })
  const started = await start(t, { tasks: [small], engine: bullmq({ connection: url.href }) })
  await started.app.ready()
  const tasks = started.app.backgroundTasks
  const failed = await tasks.enqueue(small, 'fails')
  t.match(await tasks.result(small, failed.id, { timeout: 10_000 }), { state: 'failed' })
  t.equal(await tasks.retry(small, failed.id), true)
  const aborted = new Promise<void>(resolve => { gates.set('aborted', resolve) })
  const hanging = await tasks.enqueue(small, 'hangs', { key: 'k' })
  await untilState(started, small, hanging.id, 'running')
  t.equal(await tasks.cancel(small, hanging.id), true)
  await aborted
  t.strictSame(await tasks.enqueue(small, 'fails', { key: 'k' }), { id: hanging.id, duplicate: false })
  await until(async () => (await tasks.count(small)).failed === 2)
  t.equal((await tasks.find(small, { state: 'failed' })).records.length, 2)
  // So many that their order is stored.
  const add = admin.pipeline()
  for (let n = 0; n < 5_100; n++) add.hset(`fbt:small:${n}`, { name: 'small', data: '1', timestamp: n }).zadd('fbt:small:failed', Date.now(), n)
  await add.exec()
  t.strictSame((await tasks.find(small, { state: 'failed', limit: 3 })).records.map(({ id }) => id).slice(2), ['5099'])
  t.equal(await admin.exists('fbt:small~order'), 1)
  t.strictSame(trouble(started).filter(line => !(line as { msg: string }).msg.includes('failed')), [])

  t.equal(tasks.health().connected, true)
  await server.stop()
  await until(() => !tasks.health().connected)
  for (const call of [() => tasks.count(small), () => tasks.find(small, { state: 'failed' }), () => tasks.retry(small, failed.id), () => tasks.cancel(small, failed.id), () => tasks.result(small, failed.id, { timeout: 10 })]) {
    await t.rejects(call() as Promise<unknown>, { code: 'FST_BGT_ENGINE_UNAVAILABLE', statusCode: 503 })
  }
  await server.start()
  await addUser()
  await until(() => tasks.health().connected)
})
