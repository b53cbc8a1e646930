import { PGlite } from '@electric-sql/pglite'
import { fromPglite } from 'pg-boss'
import { pgBoss } from '../../lib/engines/pg-boss/index.js'
import { conformance } from './suite.js'

conformance(async t => {
  const pglite = await PGlite.create()
  t.teardown(() => pglite.close())
  return {
    name: 'pg-boss on PGlite',
    engine: () => pgBoss({ db: fromPglite(pglite), options: { backend: 'pglite' } }),
    supports: { delay: true, key: true, tx: true, get: true }
  }
})
