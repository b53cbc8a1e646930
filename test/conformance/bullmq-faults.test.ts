import { redisServer } from '../support/servers.js'
import { faults } from './faults.js'
import { opened } from '../support/opened.js'

faults('bullmq', async t => await opened(t, 'redis-server', () => redisServer()))
