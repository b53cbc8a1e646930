// @ts-check
import { PgBoss } from 'pg-boss'
import { checked, inGroups, inTime, PAYLOAD, POSTGRES_URL, stored } from './promises.js'

/**
 * `perJob`: each job succeeds or fails on its own, as with the plugin. `best`: for jobs that never fail, since a batch fails as one. Both are
 * the fastest that were found by trying.
 */
const WORK = {
  best: { batchSize: 1_000, localConcurrency: 2, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true },
  perJob: { batchSize: 1_000, localConcurrency: 2, pollingIntervalSeconds: 0.5, burstWhenBatchFull: true, perJobResults: true }
}

/** It notifies nobody of a delayed job, and looks for one each 30 s by default where it notifies of others. */
const SOON = { notifyPollingIntervalSeconds: 0.5 }

/** @type {import('../engine-process.js').OpenWay} */
export async function pgBossByHand ({ app, place, way, role, work }) {
  const boss = new PgBoss({ connectionString: POSTGRES_URL, schema: place, useListenNotify: true })
  boss.on('error', error => { console.error(error.message) })
  await boss.start()
  await boss.createQueue('bench', way !== 'bare' || role === 'latency' ? { notify: true } : {})
  const isBare = way === 'bare' || way === 'best'
  const add = request => {
    if (isBare) return boss.send('bench', PAYLOAD)
    const { id, data } = stored(request)
    return inTime(boss.send('bench', data, { id }))
  }
  app.get('/', async request => {
    await add(request)
    return { hello: 'world' }
  })
  return {
    add,
    delayed (delay, payload) {
      const { id, data } = stored(undefined, payload)
      return inTime(boss.send('bench', data, { id, startAfter: new Date(Date.now() + delay) }))
    },
    fill: n => inGroups(n, count => boss.insert('bench', Array.from({ length: count }, () => isBare ? { data: PAYLOAD } : stored(undefined)))),
    drain: async () => {
      const settings = way === 'bare' ? {} : { ...WORK[way === 'best' ? 'best' : 'perJob'], ...role === 'delayed' && SOON }
      await boss.work('bench', settings, async jobs => {
        if (isBare) {
          for (const job of jobs) work(job.data)
          return
        }
        return await Promise.all(jobs.map(async job => {
          await work(checked(job.data.payload))
          return { id: job.id, status: 'completed' }
        }))
      })
    }
  }
}
