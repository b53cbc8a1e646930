/** Servers of their own for tests that break them: on free ports, bound to loopback, ended by process id. */
import { execFile, execFileSync, spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { chownSync, existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { promisify } from 'node:util'

export interface TestServer {
  readonly url: string
  start: () => Promise<void>
  /** As an operator stops it: what it has acknowledged is on disk. */
  stop: () => Promise<void>
  /** As a power cut does. */
  kill: () => Promise<void>
  /** Stops it, and removes its folder. */
  remove: () => Promise<void>
}

export async function freePort (): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1')
  await once(server, 'listening')
  const { port } = server.address() as AddressInfo
  server.close()
  await once(server, 'close')
  return port
}

/** Throws where there is no `redis-server`. */
export async function redisServer (...options: string[]): Promise<TestServer> {
  execFileSync('redis-server', ['--version'])
  const port = await freePort()
  const dir = mkdtempSync(join(tmpdir(), 'fbt-redis-'))
  // Acknowledged is written: so a test can count.
  const args = ['--port', String(port), '--bind', '127.0.0.1', '--appendonly', 'yes', '--appendfsync', 'always', '--save', '', '--maxmemory-policy', 'noeviction', '--dir', dir, ...options]
  return testServer(`redis://127.0.0.1:${port}`, port, dir, () => spawn('redis-server', args, { stdio: 'ignore' }), 'SIGTERM')
}

/** Throws where there is no PostgreSQL. */
export async function postgresServer (): Promise<TestServer> {
  const bin = postgresBin()
  const port = await freePort()
  const dir = mkdtempSync(join(tmpdir(), 'fbt-postgres-'))
  // It refuses to run as root.
  const asRoot = process.getuid?.() === 0
  const [uid, gid] = asRoot ? ['-u', '-g'].map(flag => Number(execFileSync('id', [flag, 'postgres']))) : []
  const user = uid === undefined || gid === undefined ? {} : { uid, gid }
  if (uid !== undefined && gid !== undefined) chownSync(dir, uid, gid)
  execFileSync(join(bin, 'initdb'), ['-D', dir, '-U', 'postgres', '-A', 'trust', '--no-sync'], { ...user, stdio: 'ignore', cwd: dir })
  const args = ['-D', dir, '-p', String(port), '-h', '127.0.0.1', '-k', '']
  return testServer(`postgres://postgres@127.0.0.1:${port}/postgres`, port, dir, () => spawn(join(bin, 'postgres'), args, { ...user, stdio: 'ignore', cwd: dir }), 'SIGINT')
}

function postgresBin (): string {
  const versions = '/usr/lib/postgresql'
  const found = existsSync(versions) ? readdirSync(versions).map(version => join(versions, version, 'bin')).find(dir => existsSync(join(dir, 'initdb'))) : undefined
  return found ?? execFileSync('pg_config', ['--bindir'], { encoding: 'utf8' }).trim()
}

/** A broker that can be commanded. */
export interface TestBroker extends TestServer {
  /** `rabbitmqctl`. */
  control: (...args: string[]) => Promise<void>
}

/** Throws where there is no RabbitMQ. Nothing of it touches a broker that the machine may have, nor its epmd. */
export async function rabbitmqServer (): Promise<TestBroker> {
  const bin = ['/usr/lib/rabbitmq/bin', '/opt/rabbitmq/sbin', '/usr/local/sbin'].find(dir => existsSync(join(dir, 'rabbitmq-server')))
  if (bin === undefined) throw new Error('no rabbitmq-server was found')
  const [port, distPort, epmdPort] = [await freePort(), await freePort(), await freePort()]
  const dir = mkdtempSync(join(tmpdir(), 'fbt-rabbitmq-'))
  const env: NodeJS.ProcessEnv = {
    PATH: process.env['PATH'],
    HOME: dir,
    ERL_EPMD_ADDRESS: '127.0.0.1',
    ERL_EPMD_PORT: String(epmdPort),
    RABBITMQ_NODENAME: `fbt-${port}@localhost`,
    RABBITMQ_NODE_IP_ADDRESS: '127.0.0.1',
    RABBITMQ_NODE_PORT: String(port),
    RABBITMQ_DIST_PORT: String(distPort),
    RABBITMQ_MNESIA_BASE: join(dir, 'mnesia'),
    RABBITMQ_LOG_BASE: join(dir, 'log'),
    RABBITMQ_CONF_ENV_FILE: join(dir, 'none'),
    RABBITMQ_CONFIG_FILE: join(dir, 'none'),
    RABBITMQ_ENABLED_PLUGINS_FILE: join(dir, 'plugins'),
    RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS: '-noinput -kernel inet_dist_use_interface {127,0,0,1}',
    // It is the process that was started then, and no script in front of it.
    RABBITMQ_ALLOW_INPUT: '1'
  }
  const options = { env, cwd: dir, stdio: 'ignore' } as const
  // Erlang would leave one running.
  const epmd = spawn('epmd', ['-port', String(epmdPort), '-address', '127.0.0.1'], options)
  const server = testServer(`amqp://guest:guest@127.0.0.1:${port}`, port, dir, () => spawn(join(bin, 'rabbitmq-server'), options), 'SIGTERM')
  return {
    ...server,
    async control (...args) {
      await promisify(execFile)(join(bin, 'rabbitmqctl'), args, { env, cwd: dir })
    },
    async remove () {
      await server.remove()
      epmd.kill()
    }
  }
}

function testServer (url: string, port: number, dir: string, run: () => ChildProcess, stopSignal: NodeJS.Signals): TestServer {
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
    async start () {
      child = run()
      while (!await answers(port)) await sleep(20)
    },
    stop: () => end(stopSignal),
    kill: () => end('SIGKILL'),
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
  const server = createServer(client => {
    const upstream = connect(port, '127.0.0.1')
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
