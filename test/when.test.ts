import t from 'tap'
import Fastify from 'fastify'
import backgroundTasks from '../lib/index.js'

t.test('smoke', async t => {
  const app = Fastify()
  t.teardown(() => app.close())
  await app.register(backgroundTasks)
  let ran = 0
  app.get('/', async request => {
    request.backgroundTasks.addTask(() => { ran++ })
    return 'ok'
  })
  await app.inject('/')
  await app.backgroundTasks.idle()
  t.equal(ran, 1)
})
