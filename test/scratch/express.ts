import { createRequire } from 'node:module'
import Fastify from 'fastify'
import fexpress from '@fastify/express'
import middie from '@fastify/middie'
import { setTimeout as sleep } from 'node:timers/promises'
import backgroundTasks from '../../lib/index.js'
import { addTask, requestTasks } from '../../lib/ambient.js'
const express = createRequire(createRequire(import.meta.url).resolve('@fastify/express'))('express') as any
console.log('express', createRequire(createRequire(import.meta.url).resolve('@fastify/express'))('express/package.json').version)
const log: string[] = []
const note = (s: string) => { log.push(s) }
for (const [name, plugin] of [['express', fexpress], ['middie', middie]] as const) {
console.log('---', name)
const app = Fastify({ forceCloseConnections: true })
await app.register(backgroundTasks, { ambient: true })
app.addHook('onRequest', (request, _reply, done) => { Object.assign(request.raw, { fastifyRequest: request }); done() })
await app.register(plugin as any)
const use = (app as any).use.bind(app)
use((req: any, _res: any, next: () => void) => { note('mw ' + req.url + (requestTasks() === req.fastifyRequest.backgroundTasks)); req.fastifyRequest.backgroundTasks.addTask(() => note('plain ' + JSON.stringify(requestTasks()?.outcome))); addTask(() => note('ambient')); next() })
use('/async', async (_req: any, _res: any, next: () => void) => { await sleep(2); addTask(() => note('after await')); next() })
use('/ends', (_req: any, res: any) => { res.statusCode = 202; res.end('ended') })
use('/fails', (_req: any, _res: any, next: (e: Error) => void) => { next(Object.assign(new Error('no'), { statusCode: 422 })) })
use('/throws', () => { throw new Error('thrown') })
use('/rejects', async () => { await sleep(1); throw new Error('rejected') })
if (name === 'express') {
  const router = express.Router()
  router.use(express.json())
  router.post('/', (req: any, res: any) => { note('router ' + JSON.stringify(req.body) + (requestTasks() !== undefined)); addTask(() => note('of router')); res.status(201).json({ ok: 1 }) })
  router.get('/fails', () => { addTask(() => note('of failing router')); throw new Error('router failed') })
  router.get('/handled', () => { addTask(() => note('of handled router')); throw new Error('router failed') })
  router.use('/handled', (_e: any, _req: any, res: any, _next: any) => { addTask(() => note('of error mw ' + JSON.stringify(requestTasks()?.outcome))); res.status(500).end('handled') })
  use('/router', router)
}
app.get('/async', async () => 'route')
app.get('/', async () => 'route')
app.addHook('onError', async (_r, _p, e) => { note('onError ' + e.message) })
const url = await app.listen({ port: 0, host: '127.0.0.1' })
for (const [path, init] of [['/'], ['/async'], ['/ends'], ['/fails'], ['/throws'], ['/rejects'], ['/router', { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{"a":1}' }], ['/router/fails'], ['/router/handled']] as Array<[string, RequestInit?]>) {
  const r = await fetch(url + path, { ...init, signal: AbortSignal.timeout(1500) }).catch(e => e); const text = r.text ? await r.text() : String(r); await sleep(10);
  console.log(path, r.status, text.slice(0, 90), '::', log.splice(0).join(' | '))
}
await app.close()
}
