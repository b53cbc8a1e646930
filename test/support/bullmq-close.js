/**
 * Closes an app in an outage, in a process of its own, which has to end by itself: `node bullmq-close.js <outage>`. Plain JavaScript with the
 * built package.
 */
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { connect, createServer } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import Fastify from 'fastify'
import backgroundTasks, { defineTask } from 'fastify-background-tasks'
import { bullmq } from 'fastify-background-tasks/bullmq'

const outage = process.argv[2]
const dir = mkdtempSync(join(tmpdir(), 'fbt-close-'))
const children = []
process.on('exit', () => {
  for (const child of children) child.kill('SIGKILL')
  rmSync(dir, { recursive: true, force: true })
})

async function freePort () {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address()
  server.close()
  return port
}

async function run (...args) {
  const child = spawn('redis-server', args, { stdio: 'ignore', cwd: dir })
  child.unref()
  children.push(child)
  return child
}

async function answers (port) {
  const socket = connect(port, '127.0.0.1')
  return await new Promise(resolve => {
    socket.on('connect', () => { socket.destroy(); resolve(true) })
    socket.on('error', () => { resolve(false) })
  })
}

async function redisServer (...options) {
  const port = await freePort()
  const child = await run('--port', String(port), '--bind', '127.0.0.1', '--save', '', '--dir', dir, ...options)
  while (!await answers(port)) await sleep(20)
  return { port, kill: () => child.kill('SIGKILL') }
}

const redis = await redisServer(...outage === 'no-room' ? ['--maxclients', '4'] : [])
const nobody = await freePort()
let mode = 'pass'
const sockets = new Set()
const proxy = createServer(client => {
  const upstream = connect(redis.port, '127.0.0.1')
  for (const [from, to] of [[client, upstream], [upstream, client]]) {
    sockets.add(from)
    from.on('error', () => {}).on('close', () => { to.destroy() })
    from.on('data', chunk => { if (mode === 'pass') to.write(chunk) })
  }
  if (mode === 'resets') client.destroy()
}).listen(0, '127.0.0.1').unref()
await once(proxy, 'listening')

let connection = `redis://127.0.0.1:${proxy.address().port}`
let sentinel
if (outage === 'never-there') connection = `redis://127.0.0.1:${nobody}`
if (outage === 'silent-sentinel' || outage === 'silent-from-start') {
  // It takes connections, and never answers.
  const silent = createServer(socket => { socket.on('error', () => {}).unref() }).listen(0, '127.0.0.1').unref()
  await once(silent, 'listening')
  const { port } = silent.address()
  connection = outage === 'silent-sentinel' ? { sentinels: [{ host: '127.0.0.1', port }, { host: '127.0.0.1', port }], name: 'jobs' } : `redis://127.0.0.1:${port}`
}
if (outage === 'no-cluster') connection = { cluster: [{ host: '127.0.0.1', port: nobody }] }
if (outage === 'no-sentinel') connection = { sentinels: [{ host: '127.0.0.1', port: nobody }], name: 'jobs' }
if (outage === 'sentinel-gone') {
  const port = await freePort()
  writeFileSync(join(dir, 'sentinel.conf'), `port ${port}\nbind 127.0.0.1\ndir ${dir}\nsentinel monitor jobs 127.0.0.1 ${redis.port} 1\n`)
  sentinel = await run(join(dir, 'sentinel.conf'), '--sentinel')
  while (!await answers(port)) await sleep(20)
  connection = { sentinels: [{ host: '127.0.0.1', port }], name: 'jobs' }
}

const tasks = ['one', 'two', 'three'].map(name => defineTask({ name, handler () {} }))
const app = Fastify()
await app.register(backgroundTasks, { tasks, engine: bullmq({ connection }), enqueueTimeout: 1_000 })
await app.ready()
await sleep(500)
if (outage === 'gone' || outage === 'sentinel-gone') {
  sentinel?.kill('SIGKILL')
  redis.kill()
}
if (outage === 'silent') mode = 'silent'
if (outage === 'resets') {
  mode = 'resets'
  for (const socket of sockets) socket.destroy()
}
if (outage === 'read-only') spawn('redis-cli', ['-p', String(redis.port), 'replicaof', '127.0.0.1', String(nobody)], { stdio: 'ignore' })
await sleep(2_000)
const from = Date.now()
await app.close()
const closed = Date.now() - from
proxy.close()
if (outage === 'silent') {
  // The sockets of the proxy itself would keep this process alive.
  for (const socket of sockets) socket.unref()
}
process.on('exit', () => { process.stdout.write(`closed ${closed} ms, ended after ${Date.now() - from} ms\n`) })
