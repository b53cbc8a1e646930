/** The code of docs/idempotent-handlers.md. */
import { Type } from '@sinclair/typebox'
import type { FastifyInstance } from 'fastify'
import { Pool, type PoolClient } from 'pg'
import { pgBoss } from '../../lib/engines/pg-boss/index.js'
import backgroundTasks, { defineTask, type TaskEngine } from '../../lib/index.js'

/** Runs the work in a transaction, unless one of this id was committed before. */
async function once (pool: Pool, id: string, work: (client: PoolClient) => Promise<void>): Promise<void> {
  const client = await pool.connect()
  try {
    await client.query('begin')
    const { rowCount } = await client.query('insert into tasks_done (id) values ($1) on conflict do nothing', [id])
    if (rowCount === 1) await work(client)
    await client.query('commit')
    client.release()
  } catch (error) {
    client.release(true)   // closed: the server rolls back
    throw error
  }
}

const creditAccountIn = (pool: Pool) => defineTask({
  name: 'credit-account',
  payload: Type.Object({ account: Type.String(), cents: Type.Integer() }),
  async handler ({ account, cents }, { id }) {
    await once(pool, id, async client => {
      const { rowCount } = await client.query('update accounts set cents = cents + $2 where name = $1', [account, cents])
      if (rowCount !== 1) throw new Error('no such account')
    })
  }
})

const connectionString = 'postgres://postgres@127.0.0.1/shop'
export const engine = pgBoss({ connectionString })

/** A webhook whose sender repeats it, behind which money is credited once. */
export async function payments (app: FastifyInstance, connectionString: string, engine: TaskEngine<unknown>): Promise<void> {
  const pool = new Pool({ connectionString })
  const creditAccount = creditAccountIn(pool)
  await app.register(backgroundTasks, { tasks: [creditAccount], engine })
  app.addHook('onClose', async () => { await pool.end() })

  app.post<{ Body: { event: string, account: string, cents: number } }>('/webhooks/payments', async (request, reply) => {
    const { event, account, cents } = request.body
    request.backgroundTasks.addTask(creditAccount, { account, cents }, { key: event })
    return await reply.code(202).send()
  })
}

export const chargeCardAt = (payments: string) => defineTask({
  name: 'charge-card',
  payload: Type.Object({ customer: Type.String(), cents: Type.Integer() }),
  timeout: 10_000,
  async handler (charge, { id, signal }) {
    const reply = await fetch(`${payments}/charges`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'idempotency-key': id },
      body: JSON.stringify(charge),
      signal
    })
    if (!reply.ok) throw new Error(`the payment API answered ${reply.status}`)
  }
})

export const sendReminderIn = (pool: Pool, sendMail: (to: string) => Promise<void>) => defineTask({
  name: 'send-reminder',
  payload: Type.Object({ to: Type.String() }),
  async handler ({ to }, { id }) {
    const { rowCount } = await pool.query('insert into tasks_done (id) values ($1) on conflict do nothing', [id])
    if (rowCount === 1) await sendMail(to)
  }
})
