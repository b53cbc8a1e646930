import Fastify from 'fastify'
import websocket from '@fastify/websocket'
import { initTRPC, TRPCError } from '@trpc/server'
import { fastifyTRPCPlugin, type CreateFastifyContextOptions, type FastifyTRPCPluginOptions } from '@trpc/server/adapters/fastify'
import { createTRPCClient, httpBatchLink, httpBatchStreamLink, httpLink, httpSubscriptionLink, createWSClient, wsLink, splitLink } from '@trpc/client'
import { z } from 'zod'
import { WebSocket } from 'ws'
import { setTimeout as sleep } from 'node:timers/promises'
import backgroundTasks from '../../lib/index.js'
import { addTask, requestTasks } from '../../lib/ambient.js'
const log: string[] = []
const note = (s: string) => { log.push(s) }
const createContext = ({ req, info }: CreateFastifyContextOptions) => { note('createContext ' + (requestTasks() !== undefined) + ' ' + ('backgroundTasks' in req) + ' ' + info?.isBatchCall); return { request: req } }
const t = initTRPC.context<typeof createContext>().create()
const router = t.router({
  plain: t.procedure.input(z.string()).mutation(({ ctx, input }) => { const { backgroundTasks: b } = ctx.request; b?.addTask(() => note('plain ' + input + ' ' + JSON.stringify(b.outcome) )); return input }),
  ambient: t.procedure.input(z.string()).mutation(async ({ input }) => { await sleep(5); addTask(() => note('ambient ' + input)); return input }),
  slow: t.procedure.input(z.string()).mutation(async ({ input }) => { await sleep(50); addTask(() => note('slow ' + input)); return input }),
  fails: t.procedure.input(z.string()).mutation(async ({ input }) => { addTask(() => note('fails ' + input + JSON.stringify(requestTasks()!.outcome))); if (input === 'plainerr') throw new Error('x');  throw new TRPCError({ code: 'CONFLICT', message: 'no' }) }),
  numbers: t.procedure.subscription(async function * () { for (const n of [1, 2, 3]) { await sleep(10); addTask(() => note('of number ' + n)); note('yield ' + n); yield n } addTask(() => note('end of sub')) }),
})
const app = Fastify({ forceCloseConnections: true, routerOptions: { maxParamLength: 5000 } })
await app.register(backgroundTasks, { ambient: true })
await app.register(websocket)
await app.register(fastifyTRPCPlugin, { prefix: '/trpc', useWSS: true, trpcOptions: { router, createContext } satisfies FastifyTRPCPluginOptions<typeof router>['trpcOptions'] })
const url = await app.listen({ port: 0, host: '127.0.0.1' }) + '/trpc'
const f = (async (u: string, i: any) => { const r = await fetch(u, i); note('status ' + r.status); return r }) as any
const say = async (w: string) => { await sleep(20); await app.backgroundTasks.idle(); console.log(w, '::', log.splice(0).join(' | ')) }
const one = createTRPCClient<typeof router>({ links: [httpLink({ url, fetch: f })] })
await one.plain.mutate('a'); await say('one')
await one.fails.mutate('a').catch(e => note(e.message)); await say('fails')
await one.fails.mutate('plainerr').catch(e => note(e.message)); await say('fails')
await one.plain.mutate(7 as never).catch(e => note('invalid')); await say('invalid')
const batch = createTRPCClient<typeof router>({ links: [httpBatchLink({ url, fetch: f })] })
await Promise.all([batch.plain.mutate('1'), batch.ambient.mutate('2'), batch.plain.mutate('3')]); await say('batch')
await Promise.allSettled([batch.plain.mutate('1'), batch.fails.mutate('2'), batch.plain.mutate('3')]); await say('batch fails one')
await Promise.allSettled([batch.fails.mutate('2'), batch.fails.mutate('3')]); await say('batch fails both')
const stream = createTRPCClient<typeof router>({ links: [httpBatchStreamLink({ url, fetch: f })] })
await Promise.allSettled([stream.plain.mutate('1').then(() => note('got 1')), stream.fails.mutate('2').catch(() => note('got 2')), stream.slow.mutate('3').then(() => note('got 3'))]); await say('stream')
const { EventSource } = await import('eventsource').catch(() => ({ EventSource: (globalThis as any).EventSource }))
if (EventSource) {
  const sub = createTRPCClient<typeof router>({ links: [splitLink({ condition: o => o.type === 'subscription', true: httpSubscriptionLink({ url, EventSource } as any), false: httpLink({ url }) })] })
  await new Promise<void>(resolve => { sub.numbers.subscribe(undefined, { onData: d => note('data ' + d), onComplete: () => { note('complete'); resolve() } }) }); await say('sse')
} else {
  const r = await fetch(url + '/numbers', { headers: { accept: 'text/event-stream' } }); note(await r.text()); await say('sse')
}
const ws = createWSClient({ url: url.replace('http', 'ws'), WebSocket: WebSocket as never })
const w = createTRPCClient<typeof router>({ links: [wsLink({ client: ws })] })
await w.ambient.mutate('ws'); await say('ws mutation')
await w.plain.mutate('ws'); await say('ws plain')
await new Promise<void>(resolve => { w.numbers.subscribe(undefined, { onData: d => note('data ' + d), onComplete: () => { note('complete'); resolve() } }) }); await say('ws sub')
await w.fails.mutate('ws').catch(e => note(e.message)); await say('ws fails')
await ws.close(); await app.close(); await say('closed')
