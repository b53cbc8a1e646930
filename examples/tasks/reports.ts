import { setTimeout as sleep } from 'node:timers/promises'
import { makeReport } from './declarations.js'

/** Work that takes its time, and fails now and then. */
export default makeReport.handledBy(async ({ title, pages }, { id, attempt, signal, log }) => {
  for (let page = 1; page <= pages; page++) await sleep(100, undefined, { signal })
  if (title === 'flaky' && attempt === 1) throw new Error('the printer is out of paper')
  log.info({ id, attempt }, `report "${title}" is ready`)
  return { file: `/reports/${id}.pdf`, pages }
}, {
  async onFailed ({ title }, error, { attempts, log }) {
    log.error({ err: error }, `report "${title}" has failed after ${attempts} attempts`)
  }
})
