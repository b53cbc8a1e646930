import { conformance } from './suite.js'

conformance(async () => ({ name: 'local', engine: undefined, supports: { delay: true, key: true, tx: false, get: true, count: true, find: true, retry: true, cancel: true } }))
