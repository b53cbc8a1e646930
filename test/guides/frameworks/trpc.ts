/** The code of docs/frameworks.md on tRPC. */
import websocket from '@fastify/websocket'
import { initTRPC, TRPCError } from '@trpc/server'
import { fastifyTRPCPlugin, type CreateFastifyContextOptions, type FastifyTRPCPluginOptions } from '@trpc/server/adapters/fastify'
import Fastify, { type FastifyInstance } from 'fastify'
import { setTimeout as sleep } from 'node:timers/promises'
import { z } from 'zod'
import { addTask, requestTasks } from '../../../lib/ambient.js'
import backgroundTasks, { BackgroundTask } from '../../../lib/index.js'
import { writeLog } from './journal.js'
import { when } from './when.js'

const createContext = ({ req }: CreateFastifyContextOptions) => ({ request: req })

const t = initTRPC.context<typeof createContext>().create()

async function saveOrder (email: string): Promise<void> {
  await sleep(1)
  if (email === '') throw new TRPCError({ code: 'CONFLICT', message: 'nobody orders' })
}

async function addOrder (email: string): Promise<void> {
  addTask(writeLog, `ordered by ${email}\n`)
}

/** What a test makes wait. */
export const report = { render: async (_percent: number): Promise<void> => {} }

const procedure = t.procedure.use(async ({ next }) => {
  const tasks: BackgroundTask[] = []
  const result = await next({ ctx: { tasks } })
  if (result.ok) for (const task of tasks) requestTasks()?.addTask(task)
  return result
})

const router = t.router({
  order: t.procedure.input(z.string()).mutation(async ({ ctx, input }) => {
    await saveOrder(input)
    ctx.request.backgroundTasks.addTask(writeLog, `ordered by ${input}\n`)
    return '17'
  }),
  orderAmbient: t.procedure.input(z.string()).mutation(async ({ input }) => {
    await addOrder(input)
    return '17'
  }),
  orderStrict: procedure.input(z.string()).mutation(async ({ ctx, input }) => {
    ctx.tasks.push(new BackgroundTask(writeLog, `ordered by ${input}\n`))
    await saveOrder(input)
    return '17'
  }),
  progress: t.procedure.subscription(async function * () {
    for (const percent of [50, 100]) {
      await report.render(percent)
      addTask(writeLog, `at ${percent} %\n`)
      yield percent
    }
  })
})

export type Router = typeof router

/** A server of the router. */
export async function shop (): Promise<FastifyInstance> {
  const app = Fastify({ routerOptions: { maxParamLength: 5_000 } })
  await app.register(backgroundTasks, { ambient: true, when })
  await app.register(websocket)
  await app.register(fastifyTRPCPlugin, {
    prefix: '/trpc',
    useWSS: true,
    trpcOptions: { router, createContext } satisfies FastifyTRPCPluginOptions<typeof router>['trpcOptions']
  })
  return app
}
