import t from 'tap'
import { opened } from '../support/opened.js'
import { rabbitmqTls } from '../support/topologies/rabbitmq.js'
import { refused, story } from './story.js'

t.setTimeout(240_000)

t.test('TLS with a CA, and a user of one vhost', async t => {
  const tls = await opened(t, 'rabbitmq-server', () => rabbitmqTls(t))
  if (tls === undefined) return
  const { server, ca, url } = tls
  const options = { ca: [ca] }

  await t.test('the server restarts', async t => {
    await story(t, {
      name: 'RabbitMQ with TLS and least rights: restart',
      engine: 'rabbitmq',
      options: { url, options },
      async fault () {
        await server.stop()
        await server.start()
      },
      writableWithin: 30_000
    })
  })

  await t.test('without the CA, with a wrong password, or with queues of somebody else: the log says why', async t => {
    await refused(t, { engine: 'rabbitmq', options: { url }, reason: /certificate/, secret: 'secret' })
    await refused(t, { engine: 'rabbitmq', options: { url: url.replace('secret', 'guessed'), options }, reason: /ACCESS.REFUSED|password/i, secret: 'guessed' })
    await refused(t, { engine: 'rabbitmq', options: { url: url.replace('/shop', '/'), options }, reason: /vhost|virtual host/i, secret: 'secret' })
    await refused(t, { engine: 'rabbitmq', options: { url, options, prefix: 'other' }, reason: /ACCESS.REFUSED/i, secret: 'secret' })
  })
})
