import { redisServer } from '../support/servers.js'
import { faults } from './faults.js'
import { opened } from './suite.js'

faults('bullmq', async t => await opened(t, 'redis-server', () => redisServer()))
