import t from 'tap'
import { opened } from '../support/opened.js'
import { rabbitmqTls } from '../support/topologies/rabbitmq.js'
import { story } from './story.js'

t.setTimeout(240_000)

t.test('TLS with a CA, and a user of one vhost: the server restarts', async t => {
  const tls = await opened(t, 'rabbitmq-server', () => rabbitmqTls(t))
  if (tls === undefined) return
  const { server, ca, url } = tls
  await story(t, {
    name: 'RabbitMQ with TLS and least rights: restart',
    engine: 'rabbitmq',
    options: { url, options: { ca: [ca] } },
    async fault () {
      await server.stop()
      await server.start()
    },
    writableWithin: 30_000
  })
})
