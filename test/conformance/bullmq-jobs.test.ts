/** Jobs of the BullMQ engine that somebody puts back, that are far away, odd, or too large, and what they leave behind. */
import { setTimeout as sleep } from 'node:timers/promises'
import { Queue, Worker, type Job } from 'bullmq'
import { Redis } from 'ioredis'
import t, { type Test } from 'tap'
import { bullmq } from '../../lib/engines/bullmq/index.js'
import { defineTask, type TaskDefinition, type TaskRecord } from '../../lib/index.js'
import { start, type Started } from '../support/app.js'
import { opened } from '../support/opened.js'
import { openRedis } from '../support/redis.js'
import { redisServer } from '../support/servers.js'

t.setTimeout(120_000)

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(20)
}

/** An app on the Redis of the machine with a task that fails, and ways to its queue. */
async function failing (t: Test): Promise<undefined | {
  connection: { url: string }
  prefix: string
  task: TaskDefinition<unknown>
  queue: Queue
  /** The numbers of the attempts that were made, since it was last asked. */
  attempts: () => number[]
  /** What `onFailed` was told. */
  failed: () => number[]
  open: (isWorker?: boolean) => Promise<Started>
  record: (started: Started, id: string) => Promise<TaskRecord<unknown> | undefined>
  /** Starts a job, and its process dies. */
  crash: () => Promise<void>
  mode: { fails: boolean }
}> {
  const redis = await openRedis(t)
  if (redis === undefined) return undefined
  const { connection, prefix } = redis
  const attempts: number[] = []
  const failed: number[] = []
  const mode = { fails: true }
  const task = defineTask({
    name: 'pay',
    retry: { attempts: 2, backoff: { type: 'fixed', delay: 10 } },
    handler (_: unknown, { attempt }) {
      attempts.push(attempt)
      if (mode.fails) throw new Error('no')
    },
    onFailed (_payload, _error, { attempts }) { failed.push(attempts) }
  })
  const queue = new Queue('pay', { connection: { url: connection }, prefix, skipMetasUpdate: true })
  t.teardown(() => queue.close())
  return {
    connection: { url: connection },
    prefix,
    task,
    queue,
    attempts: () => attempts.splice(0),
    failed: () => failed.splice(0),
    mode,
    open: async (isWorker = true) => {
      const engine = bullmq({ connection, prefix, options: { worker: { stalledInterval: 100 } } })
      const started = await start(t, { tasks: [task], engine, worker: isWorker && undefined })
      await started.app.ready()
      return started
    },
    record: async ({ app }, id) => await app.backgroundTasks.get(task, id),
    async crash () {
      const worker = new Worker('pay', undefined, { connection: { url: connection }, prefix, autorun: false, lockDuration: 100 })
      while (await worker.getNextJob('token') === undefined);
      await worker.close(true)
    }
  }
}

t.test('a job that has failed for good and is put back has all its attempts again, from 1, however it is put back', async t => {
  const found = await failing(t)
  if (found === undefined) return
  const { task, queue, attempts, failed, open, record, mode } = found
  const started = await open()
  const { id } = await started.app.backgroundTasks.enqueue(task, null)
  const toEnd = async (state: string): Promise<TaskRecord<unknown> | undefined> => {
    let last: TaskRecord<unknown> | undefined
    await until(async () => (last = await record(started, id))?.state === state)
    return last
  }
  const job = async (): Promise<Job> => await queue.getJob(id) as Job
  t.match(await toEnd('failed'), { attempt: 2, error: { message: 'no' } })
  t.strictSame([attempts(), failed()], [[1, 2], [2]])

  const ways: Record<string, () => Promise<unknown>> = {
    'the button of bull-board': async () => { await (await job()).retry() },
    'job.retry(\'failed\')': async () => { await (await job()).retry('failed') },
    'queue.retryJobs()': async () => { await queue.retryJobs() },
    'with resetAttemptsMade': async () => { await (await job()).retry('failed', { resetAttemptsMade: true, resetAttemptsStarted: true }) },
    'once more': async () => { await queue.retryJobs({ state: 'failed' }) }
  }
  for (const [name, putBack] of Object.entries(ways)) {
    await putBack()
    await until(async () => await queue.getFailedCount() === 1)
    t.match(await toEnd('failed'), { attempt: 2, error: { message: 'no' } }, name)
    t.strictSame([attempts(), failed()], [[1, 2], [2]], name)
  }

  mode.fails = false
  await (await job()).retry()
  t.match(await toEnd('succeeded'), { attempt: 1 })
  t.strictSame([attempts(), failed()], [[1], []])
  mode.fails = true
  await (await job()).retry('completed')
  t.match(await toEnd('failed'), { attempt: 2 }, 'one that had succeeded')
  t.strictSame([attempts(), failed()], [[1, 2], [2]])
})

t.test('until it starts, a job that was put back is pending with no attempt; a crash is one of its attempts', async t => {
  const found = await failing(t)
  if (found === undefined) return
  const { task, queue, attempts, failed, open, record, crash } = found
  const first = await open()
  const { id } = await first.app.backgroundTasks.enqueue(task, null)
  await until(async () => (await record(first, id))?.state === 'failed')
  await first.app.close()
  t.strictSame([attempts(), failed()], [[1, 2], [2]])

  for (const resetAttemptsMade of [false, true]) {
    await (await queue.getJob(id) as Job).retry('failed', { resetAttemptsMade })
    const web = await open(false)
    t.match(await record(web, id), { state: 'pending', attempt: 0 })
    await crash()
    t.match(await record(web, id), { state: 'running', attempt: 1 })
    await web.app.close()
    const second = await open()
    await until(async () => (await record(second, id))?.state === 'failed')
    t.match(await record(second, id), { attempt: 2 })
    t.strictSame([attempts(), failed()], [[2], [2]], 'after the crash comes the second attempt, and it is the last')
    await second.app.close()
  }
})

t.test('a job whose attempts were used up by crashes has as many in its record, and all of them again when it is put back', async t => {
  const found = await failing(t)
  if (found === undefined) return
  const { connection, prefix, task, queue, attempts, failed, open, record, crash } = found
  const web = await open(false)
  const { id } = await web.app.backgroundTasks.enqueue(task, null)
  for (let round = 1; round <= 2; round++) {
    // A worker that looks for such jobs, and starts none.
    for (let crashes = 1; crashes <= 2; crashes++) {
      await crash()
      const looker = new Worker('pay', undefined, { connection, prefix, autorun: false, stalledInterval: 50, maxStalledCount: 100 })
      await looker.startStalledCheckTimer()
      await until(async () => await queue.getWaitingCount() === 1)
      await looker.close()
      t.match(await record(web, id), { state: 'pending', attempt: crashes })
    }
    const worker = await open()
    await until(async () => (await record(worker, id))?.state === 'failed')
    t.match(await record(worker, id), { attempt: 2 })
    t.strictSame([attempts(), failed()], [[], [2]], 'it is not started a third time')
    await worker.app.close()
    await (await queue.getJob(id) as Job).retry()
  }
  const worker = await open()
  await until(async () => (await record(worker, id))?.state === 'failed')
  t.strictSame([attempts(), failed()], [[1, 2], [2]])
})

t.test('delays of any length, and names that objects have: stored, and in the way of no other job', async t => {
  const redis = await openRedis(t)
  if (redis === undefined) return
  const ran: string[] = []
  const names = ['constructor', '__proto__', 'toString', 'wait', 'mail']
  const tasks = names.map(name => defineTask({ name, handler (when: string) { ran.push(`${name} ${when}`) } }))
  const { app } = await start(t, { tasks, engine: bullmq(redis) })
  await app.ready()
  const DAY = 86_400_000
  for (const task of tasks) {
    for (const delay of [30 * DAY, 36_500 * DAY, 1e200]) {
      const { id } = await app.backgroundTasks.enqueue(task, 'far', { delay })
      t.match(await app.backgroundTasks.get(task, id), { name: task.name, state: 'delayed', attempt: 0 })
    }
    await app.backgroundTasks.enqueue(task, 'soon', { delay: 300 })
    await app.backgroundTasks.enqueue(task, 'now')
  }
  const from = Date.now()
  await until(() => ran.length === 10)
  t.ok(Date.now() - from < 1_500, `the delay of 300 ms took ${Date.now() - from} ms`)
  t.strictSame(ran.filter(run => run.endsWith('far')), [])
})

t.test('what a job leaves: no stream full of results, and no error text without an end', async t => {
  const server = await opened(t, 'redis-server', () => redisServer())
  if (server === undefined) return
  t.teardown(() => server.remove())
  await server.start()
  const redis = new Redis(server.url)
  t.teardown(() => { redis.disconnect() })
  let ran = 0
  const report = defineTask({ name: 'report', keep: { succeeded: 0, failed: 0 }, handler () { ran++; return 'r'.repeat(10_000) } })
  const loud = defineTask({ name: 'loud', retry: { attempts: 1 }, handler () { throw Object.assign(new Error('x'.repeat(5_000_000)), { name: 'n'.repeat(100_000), code: 'c'.repeat(100_000) }) } })
  const { app } = await start(t, { tasks: [report, loud], engine: bullmq({ connection: server.url }) })
  await app.ready()
  for (let i = 0; i < 1_000; i += 50) await Promise.all(Array.from({ length: 50 }, async () => await app.backgroundTasks.enqueue(report)))
  await until(() => ran === 1_000)
  const { id } = await app.backgroundTasks.enqueue(loud)
  await until(async () => (await app.backgroundTasks.get(loud, id))?.state === 'failed')
  t.match((await app.backgroundTasks.get(loud, id))?.error?.message, /^x{8192}… \(5000000 characters\)$/)
  t.ok(await redis.memory('USAGE', 'fbt:loud:' + id, 'SAMPLES', 0) as number < 100_000)
  const bytes = await redis.memory('USAGE', 'fbt:report:events', 'SAMPLES', 0) as number
  t.ok(bytes < 1_000_000, `${bytes} bytes of events`)
})

t.test('a job that the server will never take is refused alone, and not as an unavailable engine', async t => {
  const server = await opened(t, 'redis-server', () => redisServer('--proto-max-bulk-len', '1mb'))
  if (server === undefined) return
  t.teardown(() => server.remove())
  await server.start()
  const ran: number[] = []
  const note = defineTask({ name: 'note', handler (text: string) { ran.push(text.length) } })
  const { app, logs } = await start(t, { tasks: [note], engine: bullmq({ connection: server.url }) })
  await app.ready()
  const engine = bullmq({ connection: server.url, prefix: 'alone' })
  t.teardown(() => engine.stop({ drainMs: 0 }))
  await engine.start([{ name: 'note', attempts: 1, timeout: undefined, keep: { succeeded: 1, failed: 1 }, concurrency: 1 }], { log: app.log, error: () => {}, cancelled: () => {} })
  const jobOf = (length: number) => ({ id: crypto.randomUUID(), task: 'note', text: JSON.stringify('é'.repeat(length)), payload: null, delayMs: 0, keyed: false, enqueuedAt: Date.now(), headers: {}, requestId: undefined })
  await engine.enqueue([jobOf(500_000)])
  await t.rejects(engine.enqueue([jobOf(600_000)]), { code: 'FST_BGT_INVALID_PAYLOAD', message: /^The payload of the task "note" cannot be stored: the job has 12000\d\d bytes, and the server takes 1048576/ })
  const [large, ...small] = await Promise.allSettled([2_000_000, 1, 2, 3].map(async length => await app.backgroundTasks.enqueue(note, 'x'.repeat(length))))
  t.match(large, { status: 'rejected', reason: { code: 'FST_BGT_INVALID_PAYLOAD', statusCode: 500 } })
  t.ok(small.every(({ status }) => status === 'fulfilled'), 'its neighbours are stored')
  await until(() => ran.length === 3)
  t.strictSame(logs.filter(({ level, msg }) => level >= 40 && msg.startsWith('background task engine')), [], 'no connection was lost')
})

t.test('a result that the server will never take is not kept: the job has succeeded, and no connection is lost', async t => {
  const server = await opened(t, 'redis-server', () => redisServer('--proto-max-bulk-len', '1mb'))
  if (server === undefined) return
  t.teardown(() => server.remove())
  await server.start()
  let ran = 0
  const draw = defineTask({ name: 'draw', handler (length: number) { ran++; return { picture: 'é'.repeat(length) } } })
  const { app, logs } = await start(t, { tasks: [draw], engine: bullmq({ connection: server.url }) })
  await app.ready()
  const results = await Promise.all([500_000, 600_000].map(async length => {
    const { id } = await app.backgroundTasks.enqueue(draw, length)
    let record: TaskRecord<unknown> | undefined
    await until(async () => /succeeded|failed|retrying/.test((record = await app.backgroundTasks.get(draw, id))?.state ?? ''))
    t.match(record, { state: 'succeeded', attempt: 1 })
    return record?.result
  }))
  t.strictSame(results, [{ picture: 'é'.repeat(500_000) }, null])
  t.equal(ran, 2)
  t.match(logs.filter(({ level }) => level >= 40), [{ task: { name: 'draw' }, msg: /^the result of a background task is too large: it is not kept. It has 12000\d\d bytes, and the server takes 1048576/ }])
})

t.test('the names of BullMQ\'s own keys are ids of no job', async t => {
  const redis = await openRedis(t)
  if (redis === undefined) return
  const note = defineTask({ name: 'note', handler () {} })
  const { app } = await start(t, { tasks: [note], engine: bullmq(redis), worker: false })
  await app.ready()
  const { id } = await app.backgroundTasks.enqueue(note)
  const queue = new Queue('note', { connection: { url: redis.connection }, prefix: redis.prefix, skipMetasUpdate: true })
  t.teardown(() => queue.close())
  await queue.add('note', null)
  for (const name of ['wait', 'id', 'events', 'meta', 'completed', '', '\0', '__proto__']) t.equal(await app.backgroundTasks.get(note, name), undefined, JSON.stringify(name))
  t.match(await app.backgroundTasks.get(note, id), { state: 'pending' })
})
