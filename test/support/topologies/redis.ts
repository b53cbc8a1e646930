/** Redis as it stands in production: replicas, Sentinels, a cluster, TLS, users with few rights. */
import { execFile, spawn } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { Redis } from 'ioredis'
import type { Test } from 'tap'
import { freePort, redisOf, redisServer, testServer, type TestServer } from '../servers.js'
import { until } from '../services.js'
import { certificatesIn } from './certificates.js'

/** A replica is there for the whole of a test, so that nothing waits for it. */
const SOON = ['--repl-diskless-sync-delay', '0', '--repl-ping-replica-period', '1']

/** A connection of the test's own. */
export function admin (t: Test, { port }: TestServer): Redis {
  const redis = new Redis(port, '127.0.0.1', { replyMapping: 'legacy' })
  redis.on('error', () => {})
  t.teardown(() => { redis.disconnect() })
  return redis
}

/** Starts a server, which is gone at the end of the test. */
export async function started<T extends TestServer> (t: Test, server: T): Promise<T> {
  t.teardown(() => server.remove())
  await server.start()
  return server
}

/** A primary, and a replica that is up to date. */
export async function redisPair (t: Test): Promise<[primary: TestServer, replica: TestServer]> {
  const primary = await started(t, await redisServer(...SOON))
  const replica = await started(t, await redisServer(...SOON, '--replicaof', '127.0.0.1', String(primary.port)))
  await until(async () => /master_link_status:up/.test(await admin(t, replica).info('replication')), 'the replica is up', 20_000)
  return [primary, replica]
}

/** Resolves when one replica has all that the primary has acknowledged by now. */
export async function replicated (redis: Redis, key = 'marker'): Promise<void> {
  await redis.set(key, '')
  await until(async () => await redis.wait(1, 1_000) > 0, 'the replica has all', 20_000)
}

export interface Sentinels {
  /** For ioredis. */
  readonly connection: object
  readonly servers: readonly TestServer[]
  readonly sentinels: readonly TestServer[]
  /** Who is the primary now, as the Sentinels say. */
  primary: () => Promise<TestServer>
}

/** A primary, a replica, and three Sentinels that miss it after half a second. */
export async function redisSentinel (t: Test): Promise<Sentinels> {
  const servers = await redisPair(t)
  const sentinels: TestServer[] = []
  for (let i = 0; i < 3; i++) sentinels.push(await started(t, await sentinel(servers[0].port)))
  const asked = sentinels.map(server => admin(t, server))
  const knows = async (redis: Redis): Promise<boolean> => {
    const master = await redis.call('SENTINEL', 'MASTER', 'jobs') as string[]
    const valueOf = (name: string): string | undefined => master[master.indexOf(name) + 1]
    return valueOf('num-other-sentinels') === '2' && valueOf('num-slaves') === '1'
  }
  await until(async () => (await Promise.all(asked.map(knows))).every(Boolean), 'the Sentinels know each other', 30_000)
  return {
    connection: { sentinels: sentinels.map(({ port }) => ({ host: '127.0.0.1', port })), name: 'jobs' },
    servers,
    sentinels,
    async primary () {
      const [, port] = await (asked[0] as Redis).call('SENTINEL', 'GET-MASTER-ADDR-BY-NAME', 'jobs') as [string, string]
      return servers.find(server => server.port === Number(port)) as TestServer
    }
  }
}

async function sentinel (primary: number): Promise<TestServer> {
  const port = await freePort()
  const dir = mkdtempSync(join(tmpdir(), 'fbt-sentinel-'))
  const file = join(dir, 'sentinel.conf')
  writeFileSync(file, `port ${port}
bind 127.0.0.1
dir ${dir}
sentinel monitor jobs 127.0.0.1 ${primary} 2
sentinel down-after-milliseconds jobs 500
sentinel failover-timeout jobs 3000
`)
  return testServer(`redis://127.0.0.1:${port}`, port, dir, () => spawn('redis-server', [file, '--sentinel'], { stdio: 'ignore' }), 'SIGTERM')
}

export interface RedisCluster {
  readonly nodes: readonly TestServer[]
  /** The node that has the slot of `{fbt}`, and one that copies it. */
  ofSlot: () => Promise<{ master: TestServer, replica: TestServer }>
}

/** Three masters, and three replicas that miss them after a second. */
export async function redisCluster (t: Test): Promise<RedisCluster> {
  const nodes: TestServer[] = []
  // The bus of the cluster is at 10,000 above each port.
  for (let i = 0; i < 6; i++) nodes.push(await started(t, await redisServer(...SOON, '--cluster-enabled', 'yes', '--cluster-node-timeout', '1000', '--cluster-replica-validity-factor', '0')))
  await promisify(execFile)('redis-cli', ['--cluster', 'create', ...nodes.map(({ port }) => `127.0.0.1:${port}`), '--cluster-replicas', '1', '--cluster-yes'])
  const asked = nodes.map(node => admin(t, node))
  const isWhole = async (redis: Redis): Promise<boolean> => {
    const replicas = String(await redis.cluster('NODES')).match(/slave/g) ?? []
    return replicas.length === 3 && /cluster_state:ok/.test(await redis.cluster('INFO'))
  }
  await until(async () => (await Promise.all(asked.map(isWhole))).every(Boolean), 'the cluster is whole', 30_000)
  return {
    nodes,
    async ofSlot () {
      for (const redis of asked) {
        if (redis.status !== 'ready') continue
        const slot = await redis.cluster('KEYSLOT', '{fbt}')
        const [, , ...holders] = (await redis.cluster('SLOTS')).find(([from, to]) => from <= slot && slot <= to) ?? [0, 0]
        const [master, replica] = holders.map(([, port]) => nodes.find(node => node.port === port) as TestServer)
        if (master !== undefined && replica !== undefined) return { master, replica }
      }
      throw new Error('the slot of {fbt} has no replica')
    }
  }
}

/** What a user needs who only stores and runs jobs. */
export const LEAST_RIGHTS = '~fbt:* resetchannels -@all +@read +@write +@blocking +@connection +@transaction +@scripting -@dangerous +info'

/** A server that speaks only TLS, and knows only the user `jobs`, whose password is `secret`. */
export async function redisTls (t: Test): Promise<{ server: TestServer, ca: string }> {
  const dir = mkdtempSync(join(tmpdir(), 'fbt-certificates-'))
  t.teardown(() => { rmSync(dir, { recursive: true }) })
  const { key, cert, caFile, ca } = certificatesIn(dir)
  const server = await started(t, await redisOf('redis-server', port => [
    '--port', '0', '--tls-port', String(port), '--tls-cert-file', cert, '--tls-key-file', key, '--tls-ca-cert-file', caFile, '--tls-auth-clients', 'no',
    // Nobody may log in as `default`. Without rights, Redis 7.0 would drop the transactions of its own file when it starts (redis#14541).
    '--user', 'default', 'off', '~*', '&*', '+@all', '--user', 'jobs', 'on', '>secret', ...LEAST_RIGHTS.split(' ')
  ]))
  return { server, ca }
}
