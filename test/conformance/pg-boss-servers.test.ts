import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { text } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'
import pg from 'pg'
import t, { type Test } from 'tap'
import { pgBoss } from '../../lib/engines/pg-boss/index.js'
import { defineTask } from '../../lib/index.js'
import { start, type LogLine } from '../support/app.js'
import { opened } from '../support/opened.js'
import { openPostgres } from '../support/postgres.js'
import { postgresServer, proxyTo } from '../support/servers.js'

t.setTimeout(180_000)

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await new Promise(resolve => { setTimeout(resolve, 20) })
}

const warnings = (logs: readonly LogLine[]): string[] => logs.filter(({ level, reqId }) => level === 40 && reqId === undefined).map(({ msg }) => msg)

/** A line to a server on which each message takes so long. */
async function slowLine (t: Test, target: URL, delayMs: number): Promise<{ url: string, cut: () => void }> {
  const sockets = new Set<Socket>()
  const pass = (from: Socket, to: Socket): void => {
    sockets.add(from)
    from.on('data', chunk => { setTimeout(() => { if (!to.destroyed) to.write(chunk) }, delayMs) }).on('error', () => {}).on('close', () => { to.destroy() })
  }
  const server = createServer(client => {
    const upstream = connect(Number(target.port), target.hostname)
    pass(client, upstream)
    pass(upstream, client)
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  const cut = (): void => { for (const socket of sockets) socket.destroy() }
  t.teardown(() => {
    server.close()
    cut()
  })
  const url = new URL(target)
  url.hostname = '127.0.0.1'
  url.port = String((server.address() as AddressInfo).port)
  return { url: url.href, cut }
}

t.test('200 definitions come up over a line of 40 ms, whatever their names are, and are remembered', { timeout: 60_000 }, async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, schema } = postgres
  const line = await slowLine(t, new URL(connectionString), 20)
  const ran: string[] = []
  const names = ['__proto__', 'constructor', 'toString', 'name', 'table', 'x'.repeat(128), ...Array.from({ length: 194 }, (_, i) => `queue-${i}`)]
  for (const limit of [10_000, 2_000]) {
    const tasks = names.map(name => defineTask({ name, handler () { ran.push(name) } }))
    const { app } = await start(t, { tasks, engine: pgBoss({ connectionString: line.url, schema }), enqueueTimeout: 30_000 })
    const from = Date.now()
    await app.ready()
    await app.backgroundTasks.enqueue(tasks[6] as (typeof tasks)[0])
    t.ok(Date.now() - from < limit, `${Date.now() - from} ms`)
    line.cut()
    const cutAt = Date.now()
    await until(async () => await app.backgroundTasks.enqueue(tasks[6] as (typeof tasks)[0]).then(() => true, () => false))
    t.ok(Date.now() - cutAt < 2_000, `back after ${Date.now() - cutAt} ms`)
    for (const task of tasks.slice(0, 6)) await app.backgroundTasks.enqueue(task)
    await until(() => ran.length >= 8)
    t.strictSame(ran.splice(0).sort(), [...names.slice(0, 6), 'queue-0', 'queue-0'].sort())
    await app.close()
  }
})

t.test('a server that reads only', { timeout: 60_000 }, async t => {
  const server = await opened(t, 'PostgreSQL', () => postgresServer())
  if (server === undefined) return
  t.teardown(() => server.remove())
  await server.start()
  const admin = new pg.Client(server.url)
  await until(async () => {
    const client = new pg.Client(server.url)
    return await client.connect().then(async () => { await client.end(); return true }, () => false)
  })
  await admin.connect()
  t.teardown(() => admin.end())
  await admin.query('set default_transaction_read_only = off')
  /** Connections that are open follow `old`, and those that are opened later `fresh`, as if they reached another server. */
  const readOnly = async (old: 'on' | 'off', fresh: 'on' | 'off'): Promise<void> => {
    await admin.query(`alter role postgres ${old === fresh ? 'reset default_transaction_read_only' : `set default_transaction_read_only = ${fresh}`}`)
    await admin.query(`alter system set default_transaction_read_only = ${old}`)
    await admin.query('select pg_reload_conf()')
  }
  const tasks = ['one', 'two', 'three'].map(name => defineTask({ name, handler () { ran++ } }))
  let ran = 0
  const open = async (t: Test) => {
    const started = await start(t, { tasks, engine: pgBoss({ connectionString: server.url }), enqueueTimeout: 1_000 })
    started.app.get<{ Params: { i: string } }>('/:i', async request => { request.backgroundTasks.addTask(tasks[Number(request.params.i) % 3] as (typeof tasks)[0]) })
    await started.app.ready()
    const store = async (jobs: number): Promise<number[]> => await Promise.all(Array.from({ length: jobs }, async (_, i) => (await started.app.inject(`/${i}`)).statusCode))
    return { ...started, store }
  }

  await t.test('is a standby at the start, also of tables that are there: the app recovers by itself when it is promoted', async t => {
    for (let round = 0; round < 2; round++) {
      await readOnly('on', 'on')
      const { app, store, logs } = await open(t)
      t.strictSame(await store(1), [503])
      await readOnly('off', 'off')
      await until(async () => (await store(1))[0] === 200)
      t.equal(warnings(logs).length, 2, 'one warning of the outage, one that the app starts without its engine')
      await app.close()
    }
  })

  await t.test('after a failover all connections are replaced: no request fails, and the log has one warning', async t => {
    ran = 0
    const { store, logs } = await open(t)
    await until(async () => (await store(30)).every(status => status === 200))
    await until(() => ran >= 30)
    await readOnly('on', 'off')
    // Each process of the server learns of it in its own time.
    await until(async () => {
      t.strictSame(await store(30), Array(30).fill(200))
      return warnings(logs).length > 0
    })
    const before = ran
    t.strictSame(await store(30), Array(30).fill(200))
    await until(() => ran >= before + 30)
    t.match(warnings(logs), [/the server is read-only/])
    t.equal(warnings(logs).length, 1)
  })

  await t.test('as long as there is no other one, requests with jobs are a 503, with one warning for all definitions', async t => {
    await readOnly('off', 'off')
    const { app, store, logs } = await open(t)
    await readOnly('on', 'on')
    await until(async () => (await store(6)).every(status => status === 503))
    await new Promise(resolve => { setTimeout(resolve, 1_500) })
    t.equal(warnings(logs).length, 1)
    await readOnly('off', 'off')
    await until(async () => (await store(1))[0] === 200)
    const before = ran
    await app.backgroundTasks.enqueue(tasks[0] as (typeof tasks)[0])
    await until(() => ran > before)
  })
})

t.test('tables of an unknown pg-boss, and a queue that drops jobs, are one clear error, and no 202', async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, pool, schema } = postgres
  const note = defineTask({ name: 'note', handler () {} })
  const open = async () => {
    const started = await start(t, { tasks: [note], engine: pgBoss({ connectionString, schema }), enqueueTimeout: 1_500 })
    await started.app.ready()
    return started
  }
  await (await open()).app.close()
  const changes: Array<[change: string, back: string, message: RegExp]> = [
    [`update ${schema}.version set version = 999`, `update ${schema}.version set version = 46`, /have version 999, and the installed pg-boss has version 46: this package knows pg-boss 12\.38, which has version 46/],
    [`alter table ${schema}.job rename heartbeat_on to pulse_on`, `alter table ${schema}.job rename pulse_on to heartbeat_on`, /pg-boss lacks what this package uses of it \(job\.heartbeat_on\)/],
    [`alter type ${schema}.job_state rename value 'retry' to 'again'`, `alter type ${schema}.job_state rename value 'again' to 'retry'`, /pg-boss lacks what this package uses of it \(state retry\): the tables .* version 46/],
    [`update ${schema}.queue set policy = 'short'`, `update ${schema}.queue set policy = 'standard'`, /the queue "note" has the policy "short", which drops jobs: a definition needs a queue with the policy "standard"/]
  ]
  for (const [change, back, message] of changes) {
    await pool.query(change)
    const { app, logs } = await open()
    await t.rejects(app.backgroundTasks.enqueue(note), { code: 'FST_BGT_ENGINE_UNAVAILABLE' }, change)
    t.match(warnings(logs)[0], message)
    await pool.query(back)
    await until(async () => await app.backgroundTasks.enqueue(note).then(() => true, () => false))
    t.equal(warnings(logs).length, 2)
    await app.close()
  }
})

t.test('after app.close() the process ends by itself, in whatever state the connections are', { timeout: 90_000 }, async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return
  const { connectionString, schema } = postgres
  const program = `
    import Fastify from 'fastify'
    import backgroundTasks, { defineTask } from 'fastify-background-tasks'
    import { pgBoss } from 'fastify-background-tasks/pg-boss'
    const slow = defineTask({ name: 'slow', async handler () { process.send('started'); await new Promise(() => {}) } })
    const app = Fastify()
    await app.register(backgroundTasks, { tasks: [slow], engine: pgBoss({ connectionString: process.argv[1], schema: process.argv[2] }), enqueueTimeout: Number(process.argv[3]), closeTimeout: 200 })
    await app.ready()
    app.backgroundTasks.enqueue(slow).catch(() => {})
    process.once('message', async () => {
      app.backgroundTasks.enqueue(slow).catch(() => {})
      await app.close()
      process.disconnect()
    })
    process.send('ready')`
  const states: Array<[state: string, awaited: string, breakLine: (proxy: Awaited<ReturnType<typeof proxyTo>>) => void]> = [
    ['connected', 'started', () => {}],
    ['cut a moment ago', 'started', proxy => { proxy.cut() }],
    ['gone', 'started', proxy => { proxy.close() }],
    ['frozen', 'started', proxy => { proxy.freeze() }],
    ['frozen from the start', 'ready', () => {}],
    ['refused from the start', 'ready', () => {}]
  ]
  await Promise.all(states.map(async ([state, awaited, breakLine]) => {
    const target = new URL(connectionString)
    const proxy = await proxyTo(Number(target.port === '' ? 5432 : target.port))
    t.teardown(() => { proxy.close() })
    target.port = String(proxy.port)
    if (state === 'frozen from the start') proxy.freeze()
    if (state === 'refused from the start') proxy.close()
    const args = ['-u', 'NODE_OPTIONS', process.execPath, '--input-type=module', '-e', program, target.href, `${schema}_${states.findIndex(([name]) => name === state)}`, awaited === 'started' ? '30000' : '1000']
    const child = spawn('env', args, { cwd: fileURLToPath(new URL('../..', import.meta.url)), stdio: ['ignore', 'ignore', 'pipe', 'ipc'] })
    t.teardown(() => { child.kill('SIGKILL') })
    const exit = once(child, 'exit')
    const errors = child.stderr === null ? '' : text(child.stderr)
    await new Promise<void>(resolve => { child.on('message', message => { if (message === awaited) resolve() }) })
    breakLine(proxy)
    const from = Date.now()
    child.send('close')
    t.strictSame(await exit, [0, null], `${state}: ended after ${Date.now() - from} ms`)
    t.ok(Date.now() - from < 8_000, `${state}: soon`)
    t.equal(await errors, '', state)
  }))
  await Promise.all(states.map((_, i) => postgres.pool.query(`drop schema if exists ${schema}_${i} cascade`)))
})
