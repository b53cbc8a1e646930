import { setTimeout as sleep } from 'node:timers/promises'
import { Type } from '@sinclair/typebox'
import { defineTask } from 'fastify-background-tasks'

/** Work that takes its time, and fails now and then. */
export const makeReport = defineTask({
  name: 'make-report',
  payload: Type.Object({ title: Type.String({ minLength: 1 }), pages: Type.Integer({ minimum: 1, maximum: 100 }) }),
  timeout: 60_000,
  retry: { attempts: 3, backoff: { delay: 500 } },
  async handler ({ title, pages }, { id, attempt, signal, log }) {
    for (let page = 1; page <= pages; page++) await sleep(100, undefined, { signal })
    if (title === 'flaky' && attempt === 1) throw new Error('the printer is out of paper')
    log.info({ id, attempt }, `report "${title}" is ready`)
    return { file: `/reports/${id}.pdf`, pages }
  },
  async onFailed ({ title }, error, { attempts, log }) {
    log.error({ err: error }, `report "${title}" has failed after ${attempts} attempts`)
  }
})
