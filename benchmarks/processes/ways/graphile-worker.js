// @ts-check
import { makeWorkerUtils, run, Logger } from 'graphile-worker'
import pg from 'pg'
import { CONCURRENCY, inGroups, PAYLOAD, POSTGRES_URL } from './promises.js'

/** Batches as its page on performance has them. A job that runs alone starts no later for it. */
const BATCHES = { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 }
const logger = new Logger(() => () => {})

/** @type {import('../engine-process.js').OpenWay} */
export async function graphileWorker ({ app, place, role, work }) {
  const pgPool = new pg.Pool({ connectionString: POSTGRES_URL })
  pgPool.on('error', error => { console.error(error.message) })
  pgPool.on('connect', client => { client.on('error', error => { console.error(error.message) }) })
  const utils = await makeWorkerUtils({ pgPool, schema: place, logger })
  await utils.migrate()
  const add = () => utils.addJob('bench', PAYLOAD)
  app.get('/', async () => {
    await add()
    return { hello: 'world' }
  })
  return {
    add,
    fill: n => inGroups(n, count => utils.addJobs(Array.from({ length: count }, () => ({ identifier: 'bench', payload: PAYLOAD })))),
    drain: async () => {
      const worker = role === 'latency' ? {} : BATCHES
      await run({ pgPool, schema: place, logger, concurrency: CONCURRENCY, noHandleSignals: true, taskList: { bench: async payload => { await work(payload) } }, preset: { worker } })
    }
  }
}
