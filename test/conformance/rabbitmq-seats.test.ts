/** How many jobs a worker of the RabbitMQ engine takes, while jobs of all lengths move it from channel to channel. */
import { setTimeout as sleep } from 'node:timers/promises'
import t from 'tap'
import { defineTask } from '../../lib/index.js'
import { start } from '../support/app.js'
import { lineTo } from '../support/line.js'
import { openRabbitMq } from '../support/rabbitmq.js'
import { until } from '../support/services.js'

t.setTimeout(120_000)

for (const concurrency of [2, 10]) {
  t.test(`no more than ${concurrency} jobs run at the same time, however long they take and however slow the line is, and none is lost or doubled by a close`, async t => {
    const broker = await openRabbitMq(t)
    if (broker === undefined) return
    const url = new URL(broker.url)
    const line = await lineTo(Number(url.port), 40)
    t.teardown(() => { line.close() })
    url.port = String(line.port)
    const starts = new Map<number, number>()
    let [running, most] = [0, 0]
    const mixed = defineTask({
      name: 'mixed',
      async handler (n: number) {
        starts.set(n, (starts.get(n) ?? 0) + 1)
        most = Math.max(most, ++running)
        await sleep(n % 7 === 0 ? 1_200 + n : n % 50)
        running--
      }
    })
    const web = await start(t, { tasks: [mixed], engine: broker.engine(), worker: false })
    const numbers = Array.from({ length: concurrency * 30 }, (_, n) => n)
    for (const n of numbers) await web.app.backgroundTasks.enqueue(mixed, n)
    const { app, logs } = await start(t, { tasks: [mixed], engine: broker.engine({ url: url.href }), worker: { concurrency } })
    await app.ready()
    await until(() => starts.size > numbers.length * 0.6)
    await app.close()
    t.equal(running, 0)
    t.equal(most, concurrency)
    t.strictSame(logs.filter(({ level }) => level >= 40), [])
    const { messageCount } = await broker.channel.checkQueue(`${broker.prefix}.mixed`)
    t.equal(messageCount + starts.size, numbers.length)
    t.ok([...starts.values()].every(count => count === 1))
  })
}
