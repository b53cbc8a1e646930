import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { lineTo } from '../support/line.js'
import { opened } from '../support/opened.js'
import { startService, until } from '../support/services.js'
import { rabbitmqCluster, type BrokerNode } from '../support/topologies/rabbitmq.js'
import { story } from './story.js'

t.setTimeout(400_000)

t.test('RabbitMQ with three nodes', async t => {
  const cluster = await opened(t, 'rabbitmq-server', () => rabbitmqCluster(t))
  if (cluster === undefined) return
  const { nodes, leaderOf, whole } = cluster
  const [one, two, three] = nodes as [BrokerNode, BrokerNode, BrokerNode]

  /** Declares the queues of an app through this node, which leads them from then on. */
  const declare = async (t: Test, node: BrokerNode, prefix: string): Promise<void> => {
    const app = await startService(t, { engine: 'rabbitmq', options: { url: node.url, prefix }, isWorker: true })
    await until(async () => (await fetch(`${app.address}/note/0`, { method: 'POST' })).status === 202, 'a job is stored', 30_000)
    // RabbitMQ 3.10 records only after 3 s which log belongs to a new quorum queue.
    await sleep(4_000)
    await app.stop()
    t.equal((await leaderOf(`${prefix}.note`, node))?.name, node.name, 'the leader is another node than that of the app')
  }

  const restore = async (node: BrokerNode): Promise<void> => {
    node.resume()
    await node.start()
    await whole()
  }

  const faults = {
    stopped: (node: BrokerNode) => node.stop(),
    killed: (node: BrokerNode) => node.kill(),
    paused: async (node: BrokerNode) => { node.pause() }
  }

  for (const [what, fault] of Object.entries(faults)) {
    await t.test(`the leader of the queues is ${what}`, async t => {
      const prefix = `leader-${what}`
      await declare(t, one, prefix)
      t.teardown(() => restore(one))
      await story(t, {
        name: `RabbitMQ cluster: leader ${what}`,
        engine: 'rabbitmq',
        options: { url: two.url, prefix },
        fault: () => fault(one),
        writableWithin: 20_000
      })
    })
  }

  for (const [what, fault] of Object.entries(faults)) {
    // A paused node that leads the queues, too, is another case, below.
    const known = what === 'paused' ? [two, three] : nodes
    await t.test(`the node of the app is ${what}, and the app knows ${known.length}`, async t => {
      const prefix = `urls-${what}`
      await declare(t, one, prefix)
      await story(t, {
        name: `RabbitMQ cluster: several URLs, node ${what}`,
        engine: 'rabbitmq',
        options: { url: known.map(({ url }) => url), prefix },
        async fault () {
          const node = await nodeOfApp(prefix)
          t.teardown(() => restore(node))
          await fault(node)
        },
        writableWithin: 25_000
      })
    })
  }

  for (const what of ['killed', 'paused'] as const) {
    // RabbitMQ 3.10 confirms nothing until its cluster has missed a paused node (`net_ticktime`, 45 to 75 s), so this takes a minute and a half. `.ci/run` names it among what it has skipped.
    const skip = what === 'paused' && process.env['SLOW_TOPOLOGIES'] !== '1' && 'SLOW_TOPOLOGIES=1 runs it'
    await t.test(`the node of the app leads the queues, too, and is ${what}`, { skip }, async t => {
      const prefix = `both-${what}`
      await declare(t, one, prefix)
      // The app begins with any of its URLs. The others lead nowhere until it is connected.
      const lines = [await lineTo(two.port), await lineTo(three.port)]
      t.teardown(() => { for (const line of lines) line.close() })
      for (const line of lines) line.refuse()
      await story(t, {
        name: `RabbitMQ cluster: node of the app and leader ${what}`,
        engine: 'rabbitmq',
        options: { url: [one.port, ...lines.map(({ port }) => port)].map(port => urlAt(one, port)), prefix },
        async fault () {
          t.equal((await nodeOfApp(prefix)).name, one.name, 'the app is connected to the leader')
          for (const line of lines) line.accept()
          t.teardown(() => restore(one))
          await faults[what](one)
        },
        writableWithin: what === 'paused' ? 90_000 : 25_000
      })
    })
  }

  /** The node to which the publisher of an app is connected. */
  async function nodeOfApp (prefix: string): Promise<BrokerNode> {
    const connections = JSON.parse(await one.control('list_connections', 'port', 'client_properties', '--formatter', 'json')) as Array<{ port: number, client_properties: unknown }>
    const connection = connections.find(({ client_properties: properties }) => JSON.stringify(properties).includes(`${prefix} publisher`))
    return nodes.find(({ port }) => port === connection?.port) as BrokerNode
  }
})

/** The URL of a node over another port. */
function urlAt (node: BrokerNode, port: number): string {
  const url = new URL(node.url)
  url.port = String(port)
  return url.href
}
