import { PGlite } from '@electric-sql/pglite'
import { fromPglite } from 'pg-boss'
import { pgBoss } from '../../lib/engines/pg-boss/index.js'
import { sendByHand } from '../support/postgres.js'
import { conformance } from './suite.js'

conformance(async t => {
  const pglite = await PGlite.create()
  t.teardown(() => pglite.close())
  return {
    name: 'pg-boss on PGlite',
    engine: () => pgBoss({ db: fromPglite(pglite), options: { backend: 'pglite' } }),
    supports: { delay: true, key: true, tx: true, get: true, count: true, find: true, retry: true, cancel: true },
    storeByHand: (task, stored) => sendByHand({ db: fromPglite(pglite), backend: 'pglite' }, task, stored)
  }
})
