import { PGlite } from '@electric-sql/pglite'
import { bullmq } from 'fastify-background-tasks/bullmq'
import { pgBoss } from 'fastify-background-tasks/pg-boss'
import { rabbitmq } from 'fastify-background-tasks/rabbitmq'
import { fromPglite } from 'pg-boss'
import type { Placement } from './app.js'

export interface OpenPlacement extends Placement {
  close: () => Promise<void>
}

const nothing = async (): Promise<void> => {}

/**
 * `ENGINE`: none (this process), `bullmq` (`REDIS_URL`), `pg-boss` (`POSTGRES_URL`), `rabbitmq` (`RABBITMQ_URL`) or `pglite`
 * (the folder `DATA`, no server). `WORKER=false`: this process only stores.
 */
export async function placementFrom (env: NodeJS.ProcessEnv): Promise<OpenPlacement> {
  const { ENGINE = 'none', REDIS_URL = 'redis://127.0.0.1:6379', POSTGRES_URL = 'postgres://postgres@127.0.0.1:5432/postgres', DATA = 'reports-data', WORKER } = env
  const { RABBITMQ_URL = 'amqp://guest:guest@127.0.0.1:5672' } = env
  const worker = WORKER !== 'false'
  if (ENGINE === 'none') return { close: nothing }
  if (ENGINE === 'bullmq') return { worker, engine: bullmq({ connection: REDIS_URL }), close: nothing }
  if (ENGINE === 'pg-boss') return { worker, engine: pgBoss({ connectionString: POSTGRES_URL }), close: nothing }
  if (ENGINE === 'rabbitmq') return { worker, engine: rabbitmq({ url: RABBITMQ_URL }), close: nothing }
  if (ENGINE !== 'pglite') throw new Error(`ENGINE is one of none, bullmq, pg-boss, rabbitmq, pglite; not ${ENGINE}`)
  const pglite = await PGlite.create(DATA)
  return {
    worker,
    engine: pgBoss({ db: fromPglite(pglite), options: { backend: 'pglite' } }),
    close: () => pglite.close()
  }
}
