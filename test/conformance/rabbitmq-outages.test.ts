import { rabbitmq } from '../../lib/engines/rabbitmq.js'
import { opened } from '../support/opened.js'
import { rabbitmqServer } from '../support/servers.js'
import { outages } from './outages.js'

outages('rabbitmq', async t => await opened(t, 'rabbitmq-server', () => rabbitmqServer()), (url, prefix) => rabbitmq({ url, prefix }))
