import { postgresServer } from '../support/servers.js'
import { faults } from './faults.js'
import { opened } from '../support/opened.js'

faults('pg-boss', async t => await opened(t, 'PostgreSQL', () => postgresServer()))
