/** RabbitMQ as it stands in production: a cluster, TLS, a user of one vhost. */
import { createHash, randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Test } from 'tap'
import { brokerHost, freePort, rabbitmqServer, type TestBroker } from '../servers.js'
import { until } from '../services.js'
import { certificatesIn } from './certificates.js'

export interface BrokerNode extends TestBroker {
  /** As `rabbitmqctl` names it. */
  readonly name: string
}

export interface BrokerCluster {
  readonly nodes: readonly BrokerNode[]
  /** The node that decides about a queue, as another one says. */
  leaderOf: (queue: string, asked: BrokerNode) => Promise<BrokerNode | undefined>
  /** Resolves when all nodes are up and know each other. */
  whole: () => Promise<void>
}

const NAMES = ['one', 'two', 'three']

/** Three nodes on this machine. Throws where there is no RabbitMQ. */
export async function rabbitmqCluster (t: Test): Promise<BrokerCluster> {
  const host = await brokerHost()
  t.teardown(() => { host.remove() })
  const peers = NAMES.map((name, i) => `cluster_formation.classic_config.nodes.${i + 1} = ${name}@localhost\n`).join('')
  // Without `autoheal` a node that was paused for long never comes back into its cluster.
  const conf = `cluster_formation.peer_discovery_backend = classic_config\ncluster_partition_handling = autoheal\n${peers}`
  const nodes: BrokerNode[] = []
  for (const name of NAMES) nodes.push({ ...await rabbitmqServer({ conf, node: { name, host } }), name: `${name}@localhost` })
  t.teardown(() => Promise.all(nodes.map(node => node.remove())))
  await Promise.all(nodes.map(node => node.start()))
  const isWhole = async (): Promise<boolean> => {
    const status = JSON.parse(await (nodes[0] as BrokerNode).control('cluster_status', '--formatter', 'json')) as { running_nodes: string[] }
    return status.running_nodes.length === nodes.length
  }
  const whole = (): Promise<void> => until(() => isWhole().catch(() => false), 'the cluster is whole', 60_000)
  await whole()
  return {
    nodes,
    whole,
    async leaderOf (queue, asked) {
      const queues = JSON.parse(await asked.control('list_queues', 'name', 'leader', '--formatter', 'json')) as Array<{ name: string, leader: string }>
      const leader = queues.find(({ name }) => name === queue)?.leader
      return nodes.find(({ name }) => name === leader)
    }
  }
}

export interface BrokerTls {
  readonly server: TestBroker
  readonly ca: string
  /** Of a user who knows one vhost, and may use there what begins with `fbt`. */
  readonly url: string
}

/** A node that speaks TLS, too. */
export async function rabbitmqTls (t: Test): Promise<BrokerTls> {
  const dir = mkdtempSync(join(tmpdir(), 'fbt-certificates-'))
  t.teardown(() => { rmSync(dir, { recursive: true }) })
  const { key, cert, caFile, ca } = certificatesIn(dir)
  const definitions = join(dir, 'definitions.json')
  writeFileSync(definitions, JSON.stringify({
    users: [{ name: 'jobs', password_hash: hashOf('secret'), hashing_algorithm: 'rabbit_password_hashing_sha256', tags: '' }],
    vhosts: [{ name: '/' }, { name: 'shop' }],
    permissions: [{ user: 'jobs', vhost: 'shop', configure: '^fbt[.:]', write: '^(fbt[.:]|amq\\.default$)', read: '^fbt[.:]' }]
  }))
  const port = await freePort()
  const server = await rabbitmqServer({
    conf: `listeners.ssl.default = 127.0.0.1:${port}
ssl_options.cacertfile = ${caFile}
ssl_options.certfile = ${cert}
ssl_options.keyfile = ${key}
ssl_options.verify = verify_none
load_definitions = ${definitions}
`
  })
  t.teardown(() => server.remove())
  await server.start()
  return { server, ca, url: `amqps://jobs:secret@127.0.0.1:${port}/shop` }
}

/** As RabbitMQ stores passwords. */
function hashOf (password: string): string {
  const salt = randomBytes(4)
  return Buffer.concat([salt, createHash('sha256').update(salt).update(password).digest()]).toString('base64')
}
