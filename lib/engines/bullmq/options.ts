/** What `bullmq()` accepts. */
import type { QueueOptions, WorkerOptions } from 'bullmq'
import { FST_BGT_INVALID_OPTION } from '../../errors.js'
import { check, NAME, SECRET_OBJECT, type Rules } from '../../rules.js'
import { readPlace, type BullMqConnection, type Place } from './connection-options.js'

/** What is set by definitions, by the engine's own options, or by the promises of an engine. */
const RESERVED = {
  queue: ['connection', 'prefix', 'telemetry'],
  worker: [
    'connection', 'prefix', 'concurrency', 'autorun', 'removeOnComplete', 'removeOnFail', 'maxStalledCount', 'maxStartedAttempts',
    'skipStalledCheck', 'skipLockRenewal'
  ]
} as const

/** Options of `bullmq()`. A wrong value throws `FST_BGT_INVALID_OPTION` there. */
export interface BullMqOptions {
  /**
   * The Redis server: a `redis:` or `rediss:` URL, options of ioredis, `{ url, …options }`, or `{ cluster: [{ host, port }, …], …options }`
   * for a Redis Cluster. An option that ioredis does not know, or that the engine sets, is refused by its name. The server should run with
   * `maxmemory-policy noeviction`, and with `appendonly yes` if jobs are to outlive a crash of it.
   * @default 'redis://127.0.0.1:6379'
   */
  readonly connection?: BullMqConnection | undefined

  /**
   * What all keys begin with, as BullMQ's own `prefix`: dashboards need it too. For a Redis Cluster it needs a hash tag, such as `{fbt}`,
   * because all keys of a queue have to be on one node.
   * @default 'fbt', or '{fbt}' for a Redis Cluster
   */
  readonly prefix?: string | undefined

  /** Other options of BullMQ's `Queue` and `Worker`. `lockDuration` and `stalledInterval` decide when a crash is noticed. */
  readonly options?: {
    /** Without what definitions and the engine set. */
    readonly queue?: Omit<Partial<QueueOptions>, typeof RESERVED.queue[number]> | undefined
    /** Without what definitions and the engine set. */
    readonly worker?: Omit<Partial<WorkerOptions>, typeof RESERVED.worker[number]> | undefined
  } | undefined
}

const RULES: Rules = {
  // Its own check says more.
  connection: { accepts: 'anything', test: () => true, isSecret: true },
  prefix: NAME,
  options: SECRET_OBJECT
}
const OPTIONS_RULES: Rules = { queue: SECRET_OBJECT, worker: SECRET_OBJECT }

/** The options as they were checked. */
export interface CheckedOptions {
  readonly place: Place
  readonly prefix: string
  readonly queue: Partial<QueueOptions>
  readonly worker: Partial<WorkerOptions>
}

/** @throws FST_BGT_INVALID_OPTION */
export function checkOptions (options: BullMqOptions): CheckedOptions {
  check('bullmq', options, RULES)
  const place = readPlace(options.connection === undefined ? 'redis://127.0.0.1:6379' : options.connection)
  const prefix = options.prefix ?? ('cluster' in place ? '{fbt}' : 'fbt')
  // Redis takes the part between the first brace and the next closing one.
  if ('cluster' in place && !/^[^{]*\{[^}]+\}/.test(prefix)) {
    throw new FST_BGT_INVALID_OPTION('The option "prefix" of bullmq needs a hash tag for a Redis Cluster, such as "{fbt}": all keys of a queue have to be on one node')
  }
  const { queue, worker } = readLibraryOptions(options.options)
  return { place, prefix, queue, worker }
}

function readLibraryOptions (passed: BullMqOptions['options']): Pick<CheckedOptions, 'queue' | 'worker'> {
  if (passed === undefined) return { queue: {}, worker: {} }
  check('"options" of bullmq', passed, OPTIONS_RULES)
  for (const kind of ['queue', 'worker'] as const) {
    const found = passed[kind] ?? {}
    const reserved = RESERVED[kind].find(name => Object.hasOwn(found, name))
    if (reserved !== undefined) throw new FST_BGT_INVALID_OPTION(`The option "options.${kind}" of bullmq does not accept "${reserved}": the engine sets it`)
  }
  return { queue: { ...passed.queue }, worker: { ...passed.worker } }
}
