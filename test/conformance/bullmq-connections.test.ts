/** The connections of the BullMQ engine: which forms they have, and what becomes of them on servers that fail over, refuse, or go away. */
import { execFile, spawn } from 'node:child_process'
import { mkdtempSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { Queue } from 'bullmq'
import { Cluster, Redis } from 'ioredis'
import t, { type Test } from 'tap'
import { bullmq, type BullMqOptions } from '../../lib/engines/bullmq/index.js'
import { defineTask, type TaskDefinition } from '../../lib/index.js'
import { start, type LogLine, type Started } from '../support/app.js'
import { opened } from '../support/opened.js'
import { lineTo } from '../support/line.js'
import { freePort, redisServer, testServer, type TestServer } from '../support/servers.js'

t.setTimeout(240_000)

async function server (t: Test, ...options: string[]): Promise<TestServer | undefined> {
  const server = await opened(t, 'redis-server', () => redisServer(...options))
  if (server === undefined) return undefined
  t.teardown(() => server.remove())
  await server.start()
  return server
}

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(20)
}

function admin (t: Test, url: string): Redis {
  const redis = new Redis(url)
  redis.on('error', () => {})
  t.teardown(() => { redis.disconnect() })
  return redis
}

const canStore = async ({ app }: Started, task: TaskDefinition<number>, n: number): Promise<boolean> =>
  await app.backgroundTasks.enqueue(task, n).then(() => true, () => false)

/** What the engine says of its server. */
const said = (logs: LogLine[]): string[] => logs.filter(({ level, msg }) => level >= 40 && msg.startsWith('background task engine')).map(({ msg }) => msg)

/** `n` definitions whose runs are noted. */
function definitions (n: number, ran: Set<number>): Array<TaskDefinition<number>> {
  return Array.from({ length: n }, (_, i) => defineTask({ name: `t${i}`, handler (_: number) { ran.add(i) } }))
}

t.test('a server that became a replica: all connections are replaced, jobs are stored and run again, and one line says so', async t => {
  const [first, second] = [await server(t, '--repl-diskless-sync-delay', '0'), await server(t)]
  if (first === undefined || second === undefined) return
  const ports = [first, second].map(({ url }) => Number(new URL(url).port)) as [number, number]
  const [one, two] = [admin(t, first.url), admin(t, second.url)]
  await two.replicaof('127.0.0.1', ports[0])
  await until(async () => (await two.info('replication')).includes('master_link_status:up'))
  const name = await lineTo(ports[0])
  t.teardown(() => { name.close() })
  const ran: number[] = []
  const pay = defineTask({ name: 'pay', handler (n: number) { ran.push(n) } })
  const started = await start(t, { tasks: [pay], engine: bullmq({ connection: `redis://127.0.0.1:${name.port}` }) })
  await started.app.ready()
  t.ok(await canStore(started, pay, 1))
  await until(() => ran.includes(1))

  await two.replicaof('NO', 'ONE')
  name.to(ports[1])
  await one.replicaof('127.0.0.1', ports[1])
  const from = Date.now()
  await until(() => canStore(started, pay, 2))
  t.ok(Date.now() - from < 3_000, `writable after ${Date.now() - from} ms`)
  await until(() => ran.includes(2))
  t.equal(said(started.logs).filter(line => line.includes('READONLY')).length, 1)
  await until(async () => !(await one.client('LIST') as string).includes('fbt:'))
  t.pass('no worker waits at the old server')
})

t.test('while there is no server that takes writes, requests get a 503, and connections are not replaced all the time', async t => {
  const only = await server(t)
  if (only === undefined) return
  const redis = admin(t, only.url)
  const note = defineTask({ name: 'note', handler (_: number) {} })
  const started = await start(t, { tasks: [note], engine: bullmq({ connection: only.url }) })
  await started.app.ready()
  const connected = async (): Promise<number> => Number(/total_connections_received:(\d+)/.exec(await redis.info('stats'))?.[1])
  await redis.replicaof('127.0.0.1', await freePort())
  const before = await connected()
  for (let i = 0; i < 100; i++) {
    t.notOk(await canStore(started, note, i))
    await sleep(20)
  }
  t.ok(await connected() - before < 20, `${await connected() - before} connections`)
  await redis.replicaof('NO', 'ONE')
  await until(() => canStore(started, note, 0))
})

t.test('a connection is taken in each of its forms, and refused by name in every other', async t => {
  const own = await server(t)
  if (own === undefined) return
  const { hostname: host, port } = new URL(own.url)
  const note = defineTask({ name: 'note', handler () {} })
  const redis = admin(t, own.url)
  for (const connection of [own.url, `${own.url}/3?connectionName=me`, { host, port: Number(port) }, { url: own.url }, { url: own.url, db: 3, maxRetriesPerRequest: null }]) {
    const { app } = await start(t, { tasks: [note], engine: bullmq({ connection, prefix: 'forms' }), worker: false })
    await app.ready()
    const { id } = await app.backgroundTasks.enqueue(note)
    await app.close()
    await redis.select(JSON.stringify(connection).includes('3') && JSON.stringify(connection).includes('"db":3') ? 3 : String(connection).includes('/3') ? 3 : 0)
    t.ok(await redis.exists(`forms:note:${id}`), 'stored where it says')
  }

  const client = new Redis(own.url, { lazyConnect: true })
  const cluster = new Cluster([{ host, port: Number(port) }], { lazyConnect: true })
  const withPassword = 'redis://:secret@h'
  const refused: Array<[connection: unknown, message: RegExp]> = [
    [client, /instance of a client \(Redis\)/],
    [Object.create({ duplicate () {}, connect () {} }), /instance of a client/],
    [cluster, /instance of Cluster: pass its nodes/],
    [new URL(withPassword), /pass its href/],
    [new Map([['host', 'secret']]), /object \(Map\)/],
    [Promise.resolve({ host }), /a promise/],
    [() => ({ host: 'secret' }), /function/],
    [[{ host, port }], /received/],
    [new Proxy({}, { ownKeys () { throw new Error('secret') } }), /received/],
    [null, /received null/],
    [7, /a number/],
    ['', /text/],
    ['redis.example.com', /text/],
    ['http://:secret@h', /text/],
    ['redis:secret', /text/],
    ['redis:///0', /without a host/],
    ['redis://h/secret', /path/],
    ['redis://:sec%ret@h', /percent-encoded/],
    [`${withPassword}?keyPrefix=secret:`, /"keyPrefix" after/],
    [`${withPassword}?ssl_cert_reqs=none`, /"ssl_cert_reqs" after/],
    [{ url: undefined }, /"url"/],
    [{ url: withPassword, host }, /both "url" and "host"/],
    [{ url: withPassword, password: 'secret' }, /both "url" and "password"/],
    [{ url: 'http://:secret@h' }, /text/],
    [{ uri: withPassword }, /"uri": ioredis has no such option/],
    [{ hostname: 'secret' }, /"hostname": ioredis/],
    [{ constructor: 'secret' }, /"constructor": ioredis/],
    [JSON.parse('{ "__proto__": { "host": "secret" } }'), /"__proto__": ioredis/],
    [{ [withPassword]: true }, /not shown here: ioredis/],
    [{ keyPrefix: 'secret' }, /"keyPrefix": set the option "prefix"/],
    [{ retryStrategy: () => 1 }, /"retryStrategy": the engine sets it/],
    [{ maxRetriesPerRequest: 3 }, /"maxRetriesPerRequest": the engine sets it/],
    [{ enableOfflineQueue: true }, /"enableOfflineQueue": the engine sets it/],
    [{ monitor: true }, /"monitor": it has no use/],
    [{ host: undefined }, /"host" that is not a text/],
    [{ host: '' }, /"host"/],
    [{ port: 'secret' }, /"port"/],
    [{ db: NaN }, /"db"/],
    [{ db: 'secret' }, /"db"/],
    [{ sentinels: [], name: 'jobs' }, /"sentinels"/],
    [{ sentinels: [{ host }] }, /"name" beside it/],
    [{ sentinels: [{ host }], name: 'jobs', role: 'slave' }, /"role"/],
    [{ sentinels: [{ host: undefined, port: 26379 }], name: 'jobs' }, /"host"/],
    [{ sentinels: [{}], name: 'jobs' }, /"host"/],
    [{ sentinels: ['secret'], name: 'jobs' }, /a sentinel that is a string/],
    [{ sentinels: [{ host, password: 'secret' }], name: 'jobs' }, /"sentinels.password"/],
    [{ sentinels: [{ host }], name: 'jobs', host }, /both "sentinels" and "host"/],
    [{ path: '/secret', host }, /both "path" and "host"/],
    [{ host, name: 'jobs' }, /"name" without "sentinels"/],
    [`${withPassword}/1?db=2`, /"db" twice/],
    [`${withPassword}?password=secret`, /"password" twice/],
    [{ url: 'rediss://h', tls: false }, /"tls"/],
    [{ cluster: [`${withPassword}:6379`] }, /"username".*redisOptions/],
    [{ cluster: ['redis://h/3'] }, /"db".*redisOptions/],
    [{ cluster: ['rediss://h'] }, /"tls".*redisOptions/],
    [{ cluster: [] }, /"cluster"/],
    [{ cluster: host }, /"cluster"/],
    [{ cluster: [7] }, /a node/],
    [{ cluster: [{ host: undefined, port: 1 }] }, /"host"/],
    [{ cluster: [{ host, port, password: 'secret' }] }, /"password" belongs in redisOptions/],
    [{ cluster: [{ host, port }], host }, /"host": ioredis has no such option/],
    [{ cluster: [{ host, port }], keyPrefix: 'secret' }, /"keyPrefix"/],
    [{ cluster: [{ host, port }], clusterRetryStrategy: () => 1 }, /"clusterRetryStrategy": the engine sets it/],
    [{ cluster: [{ host, port }], enableOfflineQueue: false }, /"enableOfflineQueue": the engine sets it/],
    [{ cluster: [{ host, port }], redisOptions: { maxRetriesPerRequest: null } }, /"redisOptions.maxRetriesPerRequest": the engine sets it/],
    [{ cluster: [{ host, port }], redisOptions: { keyPrefix: 'secret' } }, /"redisOptions.keyPrefix"/],
    [{ cluster: [{ host, port }], redisOptions: { host } }, /"redisOptions.host"/],
    [{ cluster: [{ host, port }], redisOptions: 'secret' }, /"redisOptions"/]
  ]
  for (const [connection, message] of refused) {
    const make = (): unknown => bullmq({ connection } as BullMqOptions)
    t.throws(make, { code: 'FST_BGT_INVALID_OPTION', message })
    t.throws(make, { message: /^(?!.*secret).*It accepts a redis:/s })
  }
  client.disconnect()
  cluster.disconnect()

  const nodes = { cluster: [{ host, port: Number(port) }] }
  t.throws(() => bullmq({ connection: nodes, prefix: 'fbt' }), { code: 'FST_BGT_INVALID_OPTION', message: /hash tag/ })
  t.throws(() => bullmq({ connection: nodes, prefix: '{}fbt' }), { message: /hash tag/ })
  t.equal(bullmq({ connection: { ...nodes, redisOptions: { password: 'secret', tls: {} }, scaleReads: 'master' }, prefix: 'app{jobs}' }).name, 'bullmq')
})

t.test('a sentinel that does not answer costs no more than its turn: the next one is asked', async t => {
  const own = await server(t)
  if (own === undefined) return
  const sentinels = await Promise.all([0, 1].map(async () => {
    const port = await freePort()
    const dir = mkdtempSync(join(tmpdir(), 'fbt-sentinel-'))
    const file = join(dir, 'sentinel.conf')
    writeFileSync(file, `port ${port}\nbind 127.0.0.1\ndir ${dir}\nsentinel monitor jobs 127.0.0.1 ${own.port} 1\n`)
    const sentinel = testServer(`redis://127.0.0.1:${port}`, port, dir, () => spawn('redis-server', [file, '--sentinel'], { stdio: 'ignore' }), 'SIGTERM')
    t.teardown(() => sentinel.remove())
    await sentinel.start()
    return sentinel
  }))
  sentinels[0]?.pause()
  const note = defineTask({ name: 'note', handler (_: number) {} })
  const connection = { sentinels: sentinels.map(({ port }) => ({ host: '127.0.0.1', port })), name: 'jobs' }
  const started = await start(t, { tasks: [note], engine: bullmq({ connection }), enqueueTimeout: 10_000 })
  await started.app.ready()
  t.ok(await canStore(started, note, 1))
})

t.test('a database that the server does not have is a 503, and no job lands in database 0', async t => {
  const own = await server(t)
  if (own === undefined) return
  const note = defineTask({ name: 'note', handler () {} })
  const { app, logs } = await start(t, { tasks: [note], engine: bullmq({ connection: `${own.url}/99` }), enqueueTimeout: 500 })
  await app.ready()
  await t.rejects(app.backgroundTasks.enqueue(note), { code: 'FST_BGT_ENGINE_UNAVAILABLE' })
  t.ok(said(logs).some(line => /DB index is out of range/.test(line)))
  t.equal(await admin(t, own.url).dbsize(), 0)
})

t.test('app.close() in an outage: the process ends by itself, and ioredis writes nothing to the console', async t => {
  if (await server(t) === undefined) return
  const run = promisify(execFile)
  const program = fileURLToPath(new URL('../support/bullmq-close.js', import.meta.url))
  const outages = ['never-there', 'gone', 'silent', 'silent-from-start', 'silent-sentinel', 'resets', 'no-sentinel', 'sentinel-gone', 'no-cluster', 'read-only', 'no-room']
  await Promise.all(outages.map(async outage => {
    // `env`, for tap gives its loaders to every process that is started here, by NODE_OPTIONS.
    const { stdout, stderr } = await run('env', ['-u', 'NODE_OPTIONS', process.execPath, program, outage], { timeout: 60_000 })
    t.match(stdout, /^closed \d+ ms, ended after \d+ ms$/m, outage)
    // ioredis gives the connection to a sentinel 2 s to answer, and 2 s to close.
    t.ok(Number(/ended after (\d+)/.exec(stdout)?.[1]) < 6_000, `${outage}: ${stdout.trim()}`)
    t.equal(stderr, '', outage)
  }))
})

t.test('a quota of connections: the log names, once, the definitions that are not served, and they are when there is room', async t => {
  const small = await server(t, '--maxclients', '20')
  if (small === undefined) return
  const redis = admin(t, small.url)
  await redis.ping()
  const ran = new Set<number>()
  const tasks = definitions(30, ran)
  const started = await start(t, { tasks, engine: bullmq({ connection: small.url }) })
  await started.app.ready()
  for (const [i, task] of tasks.entries()) await started.app.backgroundTasks.enqueue(task, i)
  const told = (): string[] => said(started.logs).filter(line => line.includes('takes no further connection'))
  await until(() => told().length > 0)
  t.match(told()[0], /max number of clients reached, maxclients is 20/)
  const named = /takes no jobs of ([^.]*)\./.exec(told()[0] ?? '')?.[1]?.split(', ') ?? []
  await sleep(3_000)
  t.strictSame(new Set([...named, ...[...ran].map(i => `t${i}`)]).size, 30, 'what is not served is named')
  t.equal(told().length, 1)
  await redis.config('SET', 'maxclients', '100')
  await until(() => ran.size === 30)
  await until(() => started.logs.some(({ level, msg }) => level === 30 && msg.includes('are taken again')))
})

t.test('200 definitions come up over a line of 40 ms, and are back soon after the line is', async t => {
  const own = await server(t)
  if (own === undefined) return
  const line = await lineTo(Number(new URL(own.url).port), 20)
  t.teardown(() => { line.close() })
  const ran = new Set<number>()
  const tasks = definitions(200, ran)
  const from = Date.now()
  const started = await start(t, { tasks, engine: bullmq({ connection: `redis://127.0.0.1:${line.port}` }), enqueueTimeout: 10_000 })
  await started.app.ready()
  const all = async (): Promise<void> => {
    ran.clear()
    await Promise.all(tasks.map(async (task, i) => await started.app.backgroundTasks.enqueue(task, i)))
    await until(() => ran.size === 200)
  }
  await all()
  // One after the other, 200 queues and workers would take more than 16 s. The figures have room for a machine that does other things too.
  t.ok(Date.now() - from < 10_000, `up after ${Date.now() - from} ms`)
  line.refuse()
  await sleep(3_000)
  line.accept()
  const back = Date.now()
  await until(() => canStore(started, tasks[0] as TaskDefinition<number>, 0))
  t.ok(Date.now() - back < 3_000, `writable after ${Date.now() - back} ms`)
  await all()
  t.ok(Date.now() - back < 8_000, `all run again after ${Date.now() - back} ms`)
  // Three words of the system, and two of BullMQ about a verdict that was sent twice.
  t.ok(said(started.logs).length <= 8, `no message for each definition, nor for each attempt to connect: ${said(started.logs).join('\n')}`)
})

t.test('idle workers of 50 definitions are about as quiet as BullMQ\'s own, and an eviction policy is one line in the log', async t => {
  const own = await server(t, '--maxmemory-policy', 'volatile-lru')
  if (own === undefined) return
  const redis = admin(t, own.url)
  const warn = console.warn
  t.teardown(() => { console.warn = warn })
  const onConsole: unknown[] = []
  console.warn = (...args) => { onConsole.push(args) }
  const started = await start(t, { tasks: definitions(50, new Set()), engine: bullmq({ connection: own.url }) })
  await started.app.ready()
  t.strictSame(onConsole, [])
  t.match(said(started.logs), [/eviction policy volatile-lru/])
  t.equal(said(started.logs).length, 1)
  const scripts = async (): Promise<number> =>
    Array.from((await redis.info('commandstats')).matchAll(/cmdstat_eval(?:sha)?:calls=(\d+)/g)).reduce((sum, [, calls]) => sum + Number(calls), 0)
  await sleep(2_000)
  const before = await scripts()
  await sleep(5_000)
  // By hand: 10 a second for the waits of 5 s, and 1.7 for the looks every 30 s.
  t.ok(await scripts() - before < 2 * 5 * 10, `${(await scripts() - before) / 5} scripts a second`)
  // A queue by hand would set the length of the stream of events to 10,000.
  const queue = new Queue('t0', { connection: { url: own.url }, prefix: 'fbt', skipMetasUpdate: true })
  t.teardown(() => queue.close())
  t.equal((await redis.hget(queue.toKey('meta'), 'opts.maxLenEvents')), '10')
})
