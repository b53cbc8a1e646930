import { rabbitmqServer } from '../support/servers.js'
import { faults } from './faults.js'
import { opened } from '../support/opened.js'

faults('rabbitmq', async t => await opened(t, 'rabbitmq-server', () => rabbitmqServer()))
