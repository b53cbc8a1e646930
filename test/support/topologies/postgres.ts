/** PostgreSQL as it stands in production: with a replica behind one name, behind PgBouncer, with TLS, and with a role that may not create anything. */
import { execFileSync, spawn } from 'node:child_process'
import { chownSync, existsSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import pg from 'pg'
import { PgBoss } from 'pg-boss'
import type { Test } from 'tap'
import { freePort, postgresFolder, postgresIn, postgresUser, proxyTo, runPostgres, testServer, type Proxy, type TestServer } from '../servers.js'
import { until } from '../services.js'
import { certificatesIn } from './certificates.js'

/** Starts a server, which is gone at the end of the test. Resolves when it answers. */
export async function started<T extends TestServer> (t: Test, server: T): Promise<T> {
  t.teardown(() => server.remove())
  await start(server)
  return server
}

/** A server that was stopped or killed answers some time after it listens. */
export async function start (server: TestServer): Promise<void> {
  await server.start()
  await until(async () => await ask(server, 'select 1').then(() => true, () => false), 'the server answers', 20_000)
}

/** One statement, on a connection of its own. */
export async function ask (server: { readonly url: string }, statement: string): Promise<Array<Record<string, unknown>>> {
  const client = new pg.Client({ connectionString: server.url, connectionTimeoutMillis: 2_000 })
  client.on('error', () => {})
  await client.connect()
  try {
    return (await client.query<Record<string, unknown>>(statement)).rows
  } finally {
    await client.end()
  }
}

async function newFolder (): Promise<string> {
  const dir = postgresFolder()
  await runPostgres('initdb', dir, ['-D', dir, '-U', 'postgres', '-A', 'trust', '--no-sync'])
  return dir
}

export interface PostgresPair {
  readonly primary: TestServer
  readonly replica: TestServer
  /** The one name of both. It points at the primary. */
  readonly name: Proxy
  readonly url: string
  promote: () => Promise<void>
}

/** What the primary has committed, the replica has too: `synchronous_commit`. */
export async function postgresPair (t: Test): Promise<PostgresPair> {
  const primary = await started(t, await postgresIn(await newFolder(), 'fsync=off'))
  const dir = postgresFolder()
  await runPostgres('pg_basebackup', dir, ['-D', dir, '-R', '-X', 'stream', '-c', 'fast', '--no-sync', '-d', primary.url])
  const replica = await started(t, await postgresIn(dir, 'fsync=off'))
  await ask(primary, "alter system set synchronous_standby_names = '*'")
  await ask(primary, 'select pg_reload_conf()')
  await until(async () => (await ask(primary, 'select sync_state from pg_stat_replication'))[0]?.['sync_state'] === 'sync', 'the replica is synchronous', 20_000)
  const name = await proxyTo(primary.port)
  t.teardown(() => { name.close() })
  return {
    primary,
    replica,
    name,
    url: `postgres://postgres@127.0.0.1:${name.port}/postgres`,
    async promote () {
      await ask(replica, 'select pg_promote()')
    }
  }
}

export interface Bouncer {
  readonly server: TestServer
  readonly bouncer: TestServer
}

/** A server behind PgBouncer in transaction mode. Throws where there is no PgBouncer. */
export async function postgresBehindBouncer (t: Test): Promise<Bouncer> {
  const program = ['/usr/sbin/pgbouncer', '/usr/bin/pgbouncer', '/usr/local/bin/pgbouncer'].find(path => existsSync(path)) ?? 'pgbouncer'
  execFileSync(program, ['--version'])
  const server = await started(t, await postgresIn(await newFolder()))
  const dir = postgresFolder()
  const port = await freePort()
  const file = join(dir, 'pgbouncer.ini')
  writeFileSync(file, `[databases]
* = host=127.0.0.1 port=${server.port} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = ${port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
max_client_conn = 200
default_pool_size = 10
server_login_retry = 1
`)
  const bouncer = await started(t, testServer(`postgres://postgres@127.0.0.1:${port}/postgres`, port, dir, () => spawn(program, [file], { ...postgresUser(), stdio: 'ignore', cwd: dir }), 'SIGINT'))
  return { server, bouncer }
}

export interface PostgresTls {
  readonly server: TestServer
  readonly ca: string
  /** Of a role that may use the tables of `schema`, and create nothing. There is a role `guarded`, too, with a password. */
  readonly connectionString: string
  readonly schema: string
}

/** A server that speaks only TLS, whose administrator has made the schema. */
export async function postgresTls (t: Test): Promise<PostgresTls> {
  const dir = await newFolder()
  const { key, cert, ca } = certificatesIn(dir)
  const { uid, gid } = postgresUser()
  if (uid !== undefined && gid !== undefined) for (const file of [key, cert]) chownSync(file, uid, gid)
  writeFileSync(join(dir, 'pg_hba.conf'), `hostssl all guarded 127.0.0.1/32 scram-sha-256
hostssl all all 127.0.0.1/32 trust
`)
  const server = await postgresIn(dir, 'ssl=on', `ssl_cert_file=${cert}`, `ssl_key_file=${key}`)
  t.teardown(() => server.remove())
  const ssl = { ca }
  await server.start()
  const pool = new pg.Pool({ connectionString: server.url, ssl })
  pool.on('error', () => {})
  t.teardown(() => pool.end())
  await until(async () => await pool.query('select 1').then(() => true, () => false), 'the server answers', 20_000)

  const schema = 'jobs'
  const boss = new PgBoss({ connectionString: server.url, schema, ssl, supervise: false, schedule: false })
  await boss.start()
  await boss.stop({ graceful: false })
  await pool.query(`
    create role worker login;
    create role guarded login password 'secret';
    grant usage on schema ${schema} to worker;
    grant select, insert, update, delete on all tables in schema ${schema} to worker;
    grant execute on all functions in schema ${schema} to worker;
    revoke create on schema public from public`)
  return { server, ca, schema, connectionString: `postgres://worker@127.0.0.1:${server.port}/postgres` }
}
