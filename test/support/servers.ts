/** Servers of their own for tests that break them: on free ports, bound to loopback, ended by process id. */
import { execFile, execFileSync, spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { chownSync, existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'

export interface TestServer {
  readonly url: string
  readonly port: number
  /** Resolves when it listens. Does nothing if it runs. */
  start: () => Promise<void>
  /** As an operator stops it: what it has acknowledged is on disk. */
  stop: () => Promise<void>
  /** As a power cut does. */
  kill: () => Promise<void>
  /** It keeps its connections, and does nothing any more: SIGSTOP. */
  pause: () => void
  resume: () => void
  /** Stops it, and removes its folder. */
  remove: () => Promise<void>
}

/** Each process of tests has a hundred ports of its own. */
let nextPort = 10_000 + process.pid % 100 * 100

/**
 * A free port, and so is the one 10,000 above it. Both are below those that outgoing connections get: otherwise one of them could take the port of a server
 * that is down for a while, and a client that reconnects could meet itself.
 */
export async function freePort (): Promise<number> {
  for (;;) {
    const port = nextPort++
    if (await isFree(port) && await isFree(port + 10_000)) return port
  }
}

async function isFree (port: number): Promise<boolean> {
  const server = createServer().listen(port, '127.0.0.1')
  try {
    await once(server, 'listening')
  } catch {
    return false
  }
  server.close()
  await once(server, 'close')
  return true
}

/** Throws where there is no `redis-server`. */
export async function redisServer (...options: string[]): Promise<TestServer> {
  return await redisOf('redis-server', () => options)
}

/** @param command `redis-server`, or what is compatible with it. Throws where it is not there. */
export async function redisOf (command: string, options: (port: number) => string[]): Promise<TestServer> {
  execFileSync(command, ['--version'])
  const port = await freePort()
  const dir = mkdtempSync(join(tmpdir(), 'fbt-redis-'))
  // Acknowledged is written: so a test can count.
  const args = ['--port', String(port), '--bind', '127.0.0.1', '--appendonly', 'yes', '--appendfsync', 'always', '--save', '', '--maxmemory-policy', 'noeviction', '--dir', dir, ...options(port)]
  return testServer(`redis://127.0.0.1:${port}`, port, dir, () => spawn(command, args, { stdio: 'ignore' }), 'SIGTERM')
}

/** Throws where there is no PostgreSQL. */
export async function postgresServer (): Promise<TestServer> {
  const dir = postgresFolder()
  await runPostgres('initdb', dir, ['-D', dir, '-U', 'postgres', '-A', 'trust', '--no-sync'])
  return await postgresIn(dir)
}

/** A server on a folder that `initdb` or `pg_basebackup` has made. */
export async function postgresIn (dir: string, ...settings: string[]): Promise<TestServer> {
  const port = await freePort()
  const args = ['-D', dir, '-p', String(port), '-h', '127.0.0.1', '-k', '', ...settings.flatMap(setting => ['-c', setting])]
  const run = (): ChildProcess => spawn(join(postgresBin(), 'postgres'), args, { ...postgresUser(), stdio: 'ignore', cwd: dir })
  return testServer(`postgres://postgres@127.0.0.1:${port}/postgres`, port, dir, run, 'SIGINT')
}

/** An empty folder of the user who runs PostgreSQL. */
export function postgresFolder (): string {
  const dir = mkdtempSync(join(tmpdir(), 'fbt-postgres-'))
  const { uid, gid } = postgresUser()
  if (uid !== undefined && gid !== undefined) chownSync(dir, uid, gid)
  return dir
}

/** Runs a program of PostgreSQL. */
export async function runPostgres (program: string, cwd: string, args: string[]): Promise<void> {
  await promisify(execFile)(join(postgresBin(), program), args, { ...postgresUser(), cwd })
}

/** PostgreSQL and PgBouncer refuse to run as root. */
export function postgresUser (): { readonly uid?: number, readonly gid?: number } {
  if (process.getuid?.() !== 0) return {}
  const [uid = 0, gid = 0] = ['-u', '-g'].map(flag => Number(execFileSync('id', [flag, 'postgres'])))
  return { uid, gid }
}

function postgresBin (): string {
  const versions = '/usr/lib/postgresql'
  const found = existsSync(versions) ? readdirSync(versions).map(version => join(versions, version, 'bin')).find(dir => existsSync(join(dir, 'initdb'))) : undefined
  return found ?? execFileSync('pg_config', ['--bindir'], { encoding: 'utf8' }).trim()
}

/** A broker that can be commanded. */
export interface TestBroker extends TestServer {
  /** `rabbitmqctl`. Resolves to what it prints. */
  control: (...args: string[]) => Promise<string>
}

/** Where the nodes of a cluster find each other: a folder with their cookie, and an epmd, which Erlang would leave running. */
export interface BrokerHost {
  readonly dir: string
  readonly epmdPort: number
  remove: () => void
}

export async function brokerHost (): Promise<BrokerHost> {
  const epmdPort = await freePort()
  const dir = mkdtempSync(join(tmpdir(), 'fbt-rabbitmq-'))
  const epmd = spawn('epmd', ['-port', String(epmdPort), '-address', '127.0.0.1'], { stdio: 'ignore', cwd: dir })
  return {
    dir,
    epmdPort,
    remove () {
      epmd.kill()
      rmSync(dir, { recursive: true, force: true, maxRetries: 5 })
    }
  }
}

export interface BrokerOptions {
  /** The text of `rabbitmq.conf`. */
  readonly conf?: string
  /** The host of a cluster, whose nodes have names. Without it, the node is alone. */
  readonly node?: { readonly name: string, readonly host: BrokerHost }
}

/** Throws where there is no RabbitMQ. Nothing of it touches a broker that the machine may have, nor its epmd. */
export async function rabbitmqServer ({ conf = '', node }: BrokerOptions = {}): Promise<TestBroker> {
  const bin = ['/usr/lib/rabbitmq/bin', '/opt/rabbitmq/sbin', '/usr/local/sbin'].find(dir => existsSync(join(dir, 'rabbitmq-server')))
  if (bin === undefined) throw new Error('no rabbitmq-server was found')
  const [port, distPort] = [await freePort(), await freePort()]
  const { name, host } = node ?? { name: `fbt-${port}`, host: await brokerHost() }
  const dir = join(host.dir, name)
  mkdirSync(dir)
  writeFileSync(join(dir, 'rabbitmq.conf'), conf)
  const env: NodeJS.ProcessEnv = {
    PATH: process.env['PATH'],
    HOME: host.dir,
    ERL_EPMD_ADDRESS: '127.0.0.1',
    ERL_EPMD_PORT: String(host.epmdPort),
    RABBITMQ_NODENAME: `${name}@localhost`,
    RABBITMQ_NODE_IP_ADDRESS: '127.0.0.1',
    RABBITMQ_NODE_PORT: String(port),
    RABBITMQ_DIST_PORT: String(distPort),
    RABBITMQ_MNESIA_BASE: join(dir, 'mnesia'),
    RABBITMQ_LOG_BASE: join(dir, 'log'),
    RABBITMQ_CONF_ENV_FILE: join(dir, 'none'),
    RABBITMQ_CONFIG_FILE: join(dir, 'rabbitmq.conf'),
    RABBITMQ_ENABLED_PLUGINS_FILE: join(dir, 'plugins'),
    RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS: '-noinput -kernel inet_dist_use_interface {127,0,0,1}',
    // It is the process that was started then, and no script in front of it.
    RABBITMQ_ALLOW_INPUT: '1'
  }
  const options = { env, cwd: dir, stdio: 'ignore' } as const
  const server = testServer(`amqp://guest:guest@127.0.0.1:${port}`, port, dir, () => spawn(join(bin, 'rabbitmq-server'), options), 'SIGTERM')
  return {
    ...server,
    async control (...args) {
      const { stdout } = await promisify(execFile)(join(bin, 'rabbitmqctl'), args, { env, cwd: dir })
      return stdout
    },
    async remove () {
      await server.remove()
      if (node === undefined) host.remove()
    }
  }
}

/** @param run starts the process that listens on the port */
export function testServer (url: string, port: number, dir: string, run: () => ChildProcess, stopSignal: NodeJS.Signals): TestServer {
  let child: ChildProcess | undefined
  const end = async (signal: NodeJS.Signals): Promise<void> => {
    if (child === undefined || child.exitCode !== null) return
    const exit = once(child, 'exit')
    child.kill(signal)
    await exit
    child = undefined
  }
  return {
    url,
    port,
    async start () {
      if (child !== undefined && child.exitCode === null) return
      child = run()
      while (!await answers(port)) {
        if (child.exitCode !== null) throw new Error(`${child.spawnfile} has ended: it says ${child.exitCode}`)
        await sleep(20)
      }
    },
    stop: () => end(stopSignal),
    kill: () => end('SIGKILL'),
    pause () { child?.kill('SIGSTOP') },
    resume () { child?.kill('SIGCONT') },
    async remove () {
      await end('SIGKILL')
      rmSync(dir, { recursive: true, force: true, maxRetries: 5 })
    }
  }
}

async function answers (port: number): Promise<boolean> {
  const socket = connect(port, '127.0.0.1')
  try {
    await once(socket, 'connect')
    return true
  } catch {
    return false
  } finally {
    socket.destroy()
  }
}

export interface Proxy {
  readonly port: number
  /** New connections go elsewhere, as when a name gets another address. Those that exist stay, frozen ones too. */
  pointTo: (port: number) => void
  /** Cuts every connection. */
  cut: () => void
  /** Nothing passes any more, and nobody is told. */
  freeze: () => void
  thaw: () => void
  close: () => void
}

/** Stands between an app and a server. */
export async function proxyTo (port: number): Promise<Proxy> {
  const sockets = new Set<Socket>()
  let isFrozen = false
  let target = port
  const server = createServer(client => {
    const upstream = connect(target, '127.0.0.1')
    for (const socket of [client, upstream]) {
      sockets.add(socket)
      socket.on('error', () => {})
      socket.on('close', () => {
        sockets.delete(socket)
        client.destroy()
        upstream.destroy()
      })
    }
    for (const [from, to] of [[client, upstream], [upstream, client]] as const) {
      from.on('data', chunk => { to.write(chunk) })
      if (isFrozen) from.pause()
    }
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  const cut = (): void => { for (const socket of sockets) socket.destroy() }
  return {
    port: (server.address() as AddressInfo).port,
    pointTo (port) {
      target = port
      isFrozen = false
    },
    cut,
    freeze () {
      isFrozen = true
      for (const socket of sockets) socket.pause()
    },
    thaw () {
      isFrozen = false
      for (const socket of sockets) socket.resume()
    },
    close () {
      server.close()
      cut()
    }
  }
}
