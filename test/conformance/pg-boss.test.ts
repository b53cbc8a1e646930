import { pgBoss } from '../../lib/engines/pg-boss/index.js'
import { openPostgres, sendByHand } from '../support/postgres.js'
import { conformance } from './suite.js'

conformance(async t => {
  const postgres = await openPostgres(t)
  if (postgres === undefined) return undefined
  const { connectionString, schema } = postgres
  return {
    name: 'pg-boss',
    engine: () => pgBoss({ connectionString, schema }),
    supports: { delay: true, key: true, tx: true, get: true, count: true, find: true, retry: true, cancel: true },
    storeByHand: (task, stored) => sendByHand({ connectionString, schema }, task, stored)
  }
})
