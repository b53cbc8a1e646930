/** The forms of the option `connection`: each part of it is taken, or refused by its name, and never ignored. */
import type { ClusterOptions, RedisOptions } from 'ioredis'
import { FST_BGT_INVALID_OPTION, typeOf } from '../../errors.js'
import { readOr } from '../../foreign.js'

/** Options of ioredis that are taken. Each option of ioredis is in one of these lists, and the compiler notices when one is missing. */
const REDIS_TAKEN = [
  'Connector', 'host', 'port', 'family', 'path', 'tls', 'username', 'password', 'db', 'connectionName', 'clientInfoTag', 'disableClientInfo',
  'connectTimeout', 'disconnectTimeout', 'commandTimeout', 'blockingTimeout', 'blockingTimeoutGrace', 'keepAlive', 'noDelay', 'protocol',
  'enableReadyCheck', 'maxLoadingRetryTime', 'reconnectOnError', 'showFriendlyErrorStack', 'enableAutoPipelining', 'autoPipeliningIgnoredCommands',
  'scripts', 'himportFieldsets',
  'name', 'role', 'sentinels', 'sentinelUsername', 'sentinelPassword', 'sentinelRetryStrategy', 'sentinelReconnectStrategy', 'sentinelCommandTimeout',
  'sentinelMaxConnections', 'sentinelTLS', 'enableTLSForSentinelMode', 'preferredSlaves', 'natMap', 'updateSentinels'
] as const satisfies ReadonlyArray<keyof RedisOptions>
const REDIS_SET = [
  'retryStrategy', 'maxRetriesPerRequest', 'enableOfflineQueue', 'lazyConnect', 'socketTimeout', 'replyMapping', 'autoResendUnfulfilledCommands', 'stringNumbers', 'failoverDetector'
] as const satisfies ReadonlyArray<keyof RedisOptions>
const REDIS_UNUSED = ['autoResubscribe', 'readOnly', 'monitor', 'offlineQueue', 'commandQueue'] as const satisfies ReadonlyArray<keyof RedisOptions>

const CLUSTER_TAKEN = [
  'redisOptions', 'enableReadyCheck', 'scaleReads', 'maxRedirections', 'retryDelayOnFailover', 'retryDelayOnClusterDown', 'retryDelayOnTryAgain',
  'retryDelayOnMoved', 'slotsRefreshTimeout', 'slotsRefreshInterval', 'clusterNodeRetryStrategy', 'useSRVRecords', 'resolveSrv', 'dnsLookup', 'natMap',
  'enableAutoPipelining', 'autoPipeliningIgnoredCommands', 'scripts', 'himportFieldsets', 'showFriendlyErrorStack'
] as const satisfies ReadonlyArray<keyof ClusterOptions>
const CLUSTER_SET = ['clusterRetryStrategy', 'enableOfflineQueue', 'lazyConnect'] as const satisfies ReadonlyArray<keyof ClusterOptions>
const CLUSTER_UNUSED = ['shardedSubscribers'] as const satisfies ReadonlyArray<keyof ClusterOptions>

/** The reason why an option is refused, or an empty text. */
type Known = Readonly<Record<string, string>>

const PREFIX = 'set the option "prefix" of bullmq, because BullMQ makes the keys'
const REDIS_OPTIONS = {
  ...reasons(REDIS_TAKEN, ''), ...reasons(REDIS_SET, 'the engine sets it'), ...reasons(REDIS_UNUSED, 'it has no use here'), keyPrefix: PREFIX
} satisfies Record<keyof RedisOptions, string>
const CLUSTER_OPTIONS = {
  ...reasons(CLUSTER_TAKEN, ''), ...reasons(CLUSTER_SET, 'the engine sets it'), ...reasons(CLUSTER_UNUSED, 'it has no use here'), keyPrefix: PREFIX
} satisfies Record<keyof ClusterOptions, string>
/** `redisOptions` of a cluster: where its nodes are is told by `cluster`, and by the cluster itself. */
const NODE_OPTIONS = {
  ...REDIS_OPTIONS, ...reasons(['host', 'port', 'path', 'sentinels', 'name', 'role', 'Connector'], 'a node is told by "cluster"'), db: 'a cluster has one database'
} satisfies Known
const SENTINEL_OPTIONS = reasons(['host', 'port', 'family'], '')

/** A node of a Redis Cluster: a URL, or its address. */
export type ClusterNode = string | { readonly host: string, readonly port?: number | undefined }
/**
 * Where Redis is: a URL, options of ioredis's `Redis`, both, or nodes and options of its `Cluster`. The options that the engine sets are
 * refused when it is made.
 */
export type BullMqConnection =
  | string
  | RedisOptions
  | (RedisOptions & { readonly url: string })
  | (ClusterOptions & { readonly cluster: readonly ClusterNode[] })

export interface SingleForm { readonly url: string | undefined, readonly options: RedisOptions }
export interface ClusterForm { readonly cluster: ReadonlyArray<string | { host: string, port: number }>, readonly options: ClusterOptions }
/** The option `connection` as it was checked. */
export type Place = SingleForm | ClusterForm

const ACCEPTED = 'It accepts a redis: or rediss: URL, an object of options of ioredis, { url, …options }, or { cluster: [{ host, port }, …], …options of a Cluster }'
/** What a URL may carry after its `?`. All other options of ioredis are no texts. */
const IN_QUERY: ReadonlySet<string> = new Set(['family', 'db', 'username', 'password', 'connectionName', 'clientInfoTag'])
/** Options that a URL has in itself. */
const IN_URL = ['host', 'port', 'path', 'sentinels', 'name'] as const
/** Ways to say where the server is. ioredis takes the first one, and ignores the others. */
const WAYS = ['path', 'sentinels', 'host'] as const

/**
 * Reads the option `connection` once.
 * @throws FST_BGT_INVALID_OPTION
 */
export function readPlace (connection: unknown): Place {
  if (typeof connection === 'string') {
    checkUrl(connection)
    return { url: connection, options: {} }
  }
  const found = plain(connection)
  if (found === undefined) throw refused(`received ${kindOf(connection)}`)
  if (Object.hasOwn(found, 'cluster')) return readCluster(found)

  const { url, ...options } = found
  checkKeys(options, REDIS_OPTIONS, name => name === 'maxRetriesPerRequest' && options[name] === null)
  checkValues(options)
  const [way, other] = WAYS.filter(name => Object.hasOwn(options, name))
  if (other !== undefined) throw refused(`has both "${way}" and "${other}", of which one would be ignored`)
  if (Object.hasOwn(options, 'name') && way !== 'sentinels') throw refused('has a "name" without "sentinels"')
  if (way === 'sentinels') options['sentinels'] = (options['sentinels'] as unknown[]).map(readSentinel)
  if (!Object.hasOwn(found, 'url')) return { url: undefined, options }
  if (typeof url !== 'string') throw refused(`has a "url" that is ${typeOf(url)}`)
  const inUrl = checkUrl(url)
  const twice = [...IN_URL, ...inUrl].find(name => Object.hasOwn(options, name))
  if (twice !== undefined) throw refused(`has both "url" and "${twice}", which say the same`)
  const { tls } = options
  if (url.startsWith('rediss:') && tls !== undefined && !tls) throw refused('has a rediss: URL and a "tls" that says no')
  return { url, options }
}

function readCluster ({ cluster, ...options }: Record<string, unknown>): ClusterForm {
  checkKeys(options, CLUSTER_OPTIONS, () => false)
  const redisOptions = options['redisOptions']
  if (redisOptions !== undefined) {
    const found = plain(redisOptions)
    if (found === undefined) throw refused(`has "redisOptions" that are ${typeOf(redisOptions)}`)
    checkKeys(found, NODE_OPTIONS, () => false, 'redisOptions.')
    checkValues(found)
    options['redisOptions'] = found
  }
  const nodes = readOr(undefined, () => Array.isArray(cluster) ? [...cluster as unknown[]] : undefined)
  if (nodes === undefined || nodes.length === 0) throw refused('has a "cluster" that is not a list of nodes')
  return { cluster: nodes.map(readNode), options }
}

function readNode (node: unknown): string | { host: string, port: number } {
  if (typeof node === 'string') {
    const [inUrl] = checkUrl(node)
    const inNode = inUrl ?? (node.startsWith('rediss:') ? 'tls' : undefined)
    if (inNode !== undefined) throw refused(`has a node in "cluster" whose URL has ${nameOf(inNode)}: nodes that the cluster tells of would not get it. It belongs in redisOptions`)
    return node
  }
  const found = plain(node)
  const other = Object.keys(found ?? {}).find(name => name !== 'host' && name !== 'port')
  if (found === undefined || other !== undefined) throw refused(`has a node in "cluster" that is ${found === undefined ? typeOf(node) : `not { host, port }: ${nameOf(other)} belongs in redisOptions`}`)
  const { host, port = 6379 } = found
  checkValues({ host, port })
  return { host: host as string, port: Number(port) }
}

function readSentinel (sentinel: unknown): { host: string } {
  const found = plain(sentinel)
  if (found === undefined) throw refused(`has a sentinel that is ${typeOf(sentinel)}, and not { host, port }`)
  checkKeys(found, SENTINEL_OPTIONS, () => false, 'sentinels.')
  // Without a host, ioredis would ask 127.0.0.1.
  checkValues({ host: undefined, ...found })
  return found as { host: string }
}

/** @returns the options that the URL has in itself */
function checkUrl (url: string): string[] {
  const parsed = readOr(undefined, () => /^rediss?:\/\//.test(url) ? new URL(url) : undefined)
  if (parsed === undefined) throw refused('received a text that is not such a URL, not shown here')
  if (parsed.hostname === '') throw refused('received a URL without a host')
  if (!/^\/?\d*$/.test(parsed.pathname)) throw refused('received a URL whose path is not the number of a database')
  if (readOr(true, () => decodeURIComponent(parsed.username + parsed.password) === undefined)) throw refused('received a URL whose user or password is not percent-encoded')
  const inQuery = [...parsed.searchParams.keys()]
  const unknown = inQuery.find(name => !IN_QUERY.has(name))
  if (unknown !== undefined) throw refused(`received a URL with ${nameOf(unknown)} after its "?", which is not taken from there`)
  const hasUser = parsed.username !== '' || parsed.password !== ''
  const inUrl = [...inQuery, ...hasUser ? ['username', 'password'] : [], ...parsed.pathname.length > 1 ? ['db'] : []]
  const twice = inUrl.find((name, i) => inUrl.indexOf(name) < i)
  if (twice !== undefined) throw refused(`received a URL that has "${twice}" twice`)
  return inUrl
}

function checkKeys (options: Record<string, unknown>, known: Known, isTaken: (name: string) => boolean, where = ''): void {
  for (const name of Object.keys(options)) {
    const reason = Object.hasOwn(known, name) ? known[name] : 'ioredis has no such option'
    if (reason !== '' && !isTaken(name)) throw refused(`does not accept ${nameOf(where + name)}: ${reason}`)
  }
}

/** A value that ioredis would replace by a default is refused, because the jobs would go to a Redis that nobody named. */
function checkValues (options: Record<string, unknown>): void {
  const wrong = (name: string, accepts: string, test: (value: unknown) => boolean): void => {
    if (Object.hasOwn(options, name) && !test(options[name])) throw refused(`has a "${name}" that is not ${accepts}`)
  }
  const isText = (value: unknown): boolean => typeof value === 'string' && value !== ''
  const isNumber = (max: number) => (value: unknown): boolean => value === undefined || (/^\d{1,5}$/.test(String(value)) && Number(value) <= max)
  for (const name of ['host', 'path', 'name']) wrong(name, 'a text', isText)
  wrong('port', 'the number of a port', isNumber(65_535))
  wrong('db', 'the number of a database', isNumber(99_999))
  wrong('sentinels', 'a list of sentinels with "name" beside it', value => Array.isArray(value) && value.length > 0 && isText(options['name']))
  wrong('role', '"master": jobs are written', value => value === undefined || value === 'master')
}

/** A copy of an object of options. Undefined if the value is anything else, such as a client or an instance of URL. */
function plain (value: unknown): Record<string, unknown> | undefined {
  return readOr(undefined, () => {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) return undefined
    const prototype: unknown = Object.getPrototypeOf(value)
    // The prototype of an object of another realm has no prototype either.
    if (prototype !== null && Object.getPrototypeOf(prototype) !== null) return undefined
    return { ...value }
  })
}

/** The kind of a value that is no form of a connection. Several copies of ioredis may be installed, so a client is recognized by its shape. */
function kindOf (value: unknown): string {
  const client = value as { duplicate?: unknown, connect?: unknown, isCluster?: unknown } | null | undefined
  const isClient = readOr(false, () => typeof client?.duplicate === 'function' && typeof client.connect === 'function')
  if (!isClient) return `${typeOf(value)}${readOr(false, () => value instanceof URL) ? ': pass its href' : ''}`
  return readOr(false, () => client?.isCluster === true)
    ? 'an instance of Cluster: pass its nodes as { cluster: [{ host, port }, …] }, because the engine makes connections of its own'
    : 'an instance of a client (Redis): pass its options, because the engine makes connections of its own'
}

function reasons<K extends string> (names: readonly K[], reason: string): Record<K, string> {
  return Object.fromEntries(names.map(name => [name, reason])) as Record<K, string>
}

/** The name of an option. Somebody may have passed a secret as a name. */
function nameOf (name: unknown): string {
  return typeof name === 'string' && /^[\w.]{1,60}$/.test(name) ? `"${name}"` : 'an option whose name is not shown here'
}

function refused (what: string): Error {
  return new FST_BGT_INVALID_OPTION(`The option "connection" of bullmq ${what}. ${ACCEPTED}`)
}
