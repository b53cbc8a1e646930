import Fastify, { type FastifyReply, type FastifyRequest } from 'fastify'
import mercurius from 'mercurius'
import { WebSocket } from 'ws'
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import backgroundTasks from '../../lib/index.js'
import { addTask, requestTasks } from '../../lib/ambient.js'
const log: string[] = []
const note = (s: string) => { log.push(s) }
for (const own of [false, true]) {
console.log('--- own context', own)
const app = Fastify({ forceCloseConnections: true })
await app.register(backgroundTasks, { ambient: true })
const outcome = () => JSON.stringify(requestTasks()?.outcome)
await app.register(mercurius, {
  schema: `type Query { ok: Int, n: Int!, fails: Int, failsHard: Int! } type Mutation { place(email: String): String, bad: Int  } type Subscription { placed: String }`,
  resolvers: {
    Query: { ok: () => { addTask(() => note('ok ' + outcome())); return 1 }, n: () => 2, fails: () => { throw new Error('no') }, failsHard: () => { throw new Error('hard') } },
    Mutation: { async place (_: unknown, { email }: any, ctx: any) { note(Object.keys(ctx).join()); addTask(() => note('ambient ' + email + outcome())); ctx.reply?.request.backgroundTasks.addTask(() => note('plain ' + email)); ctx.request?.backgroundTasks.addTask(() => note('by request ' + email)); await ctx.pubsub.publish({ topic: 'placed', payload: { placed: email } }); return '17' } , bad: async () => { await sleep(2); throw new Error('bad') } },
    Subscription: { placed: { subscribe: async (_: unknown, __: unknown, ctx: any) => { note('subscribe keys ' + Object.keys(ctx).join() + ' same ' + (requestTasks() === ctx.request?.backgroundTasks)); addTask(() => note('sub task ' + outcome())); return await ctx.pubsub.subscribe('placed') }, resolve: (p: any, _: any, ctx: any) => { note('resolve ' + (requestTasks() !== undefined) + (requestTasks() === ctx.request?.backgroundTasks)); requestTasks()?.addTask(() => note('event task')); ctx.request?.backgroundTasks.addTask(() => note('event plain')); return p.placed } } }
  } as any,
  allowBatchedQueries: true,
  subscription: own ? { context: (_: any, request: FastifyRequest) => ({ request, mine: 1 }) } as any : true,
  ...own ? { context: (request: FastifyRequest) => ({ request }) } : {}
})
app.addHook('onSend', async request => { note('onSend ' ); void request })
app.addHook('onError', async (_r, _p, e) => { note('onError ' + e.message) })
const url = await app.listen({ port: 0, host: '127.0.0.1' })
const post = async (body: object) => { const r = await fetch(url + '/graphql', { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) }); const text = await r.text(); await app.backgroundTasks.idle(); console.log(JSON.stringify(body), r.status, text, '::', log.splice(0).join(' | ')) }
await post({ query: '{ ok n }' })
await post({ query: '{ ok fails }' })
await post({ query: '{ ok failsHard }' })
await post({ query: '{ failsHard }' })
await post({ query: '{ unknown }' })
await post({ query: '{ ok ' })
await post({})
await post({ query: 'mutation { place(email: "ada") }' })
await post({ query: 'mutation { place(email: "ada") bad other: place(email: "bob") }' })
await post([{ query: '{ ok }' }, { query: '{ ok fails }' }, { query: '{ unknown }' }] as any)
const ws = new WebSocket(url.replace('http', 'ws') + '/graphql', 'graphql-transport-ws')
await once(ws, 'open')
ws.on('message', m => note('ws ' + m))
ws.send(JSON.stringify({ type: 'connection_init' }))
await sleep(50)
ws.send(JSON.stringify({ type: 'subscribe', id: '1', payload: { query: 'subscription { placed }' } }))
await sleep(50)
await app.backgroundTasks.idle(); console.log(log.splice(0).join(' | '))
await post({ query: 'mutation { place(email: "eve") }' })
await sleep(50)
console.log(log.splice(0).join(' | '))
ws.close(); await sleep(20); console.log(log.splice(0).join(' | ')); await app.close()
}
