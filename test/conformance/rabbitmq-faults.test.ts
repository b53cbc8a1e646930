import { rabbitmqServer } from '../support/servers.js'
import { faults } from './faults.js'
import { opened } from '../support/opened.js'

// RabbitMQ 3.10 writes down after 3 s which log belongs to a new quorum queue: killed before, it starts with an empty one.
faults('rabbitmq', async t => await opened(t, 'rabbitmq-server', () => rabbitmqServer()), 4_000)
