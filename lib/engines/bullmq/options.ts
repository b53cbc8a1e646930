/** What `bullmq()` accepts. */
import type { QueueOptions, WorkerOptions } from 'bullmq'
import { Redis, type RedisOptions } from 'ioredis'
import { FST_BGT_INVALID_OPTION } from '../../errors.js'
import { check, NAME, SECRET_OBJECT, type Rules } from '../../rules.js'

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
   * The Redis server: a `redis:` or `rediss:` URL, or options of ioredis. It should run with `maxmemory-policy noeviction`,
   * and with `appendonly yes` if jobs are to outlive a crash of it.
   * @default 'redis://127.0.0.1:6379'
   */
  readonly connection?: string | RedisOptions | undefined

  /**
   * What all keys begin with, as BullMQ's own `prefix`: dashboards need it too.
   * @default 'fbt'
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
  connection: { accepts: 'a redis: or rediss: URL, or an object of options of ioredis, without keyPrefix', test: isConnection, isSecret: true },
  prefix: NAME,
  options: SECRET_OBJECT
}
const OPTIONS_RULES: Rules = { queue: SECRET_OBJECT, worker: SECRET_OBJECT }

/** @throws FST_BGT_INVALID_OPTION */
export function checkOptions (options: BullMqOptions): void {
  check('bullmq', options, RULES)
  if (options.options === undefined) return
  check('"options" of bullmq', options.options, OPTIONS_RULES)
  for (const kind of ['queue', 'worker'] as const) {
    const passed = options.options[kind] ?? {}
    const reserved = RESERVED[kind].find(name => Object.hasOwn(passed, name))
    if (reserved !== undefined) throw new FST_BGT_INVALID_OPTION(`The option "options.${kind}" of bullmq does not accept "${reserved}": the engine sets it`)
  }
}

function isConnection (connection: unknown): boolean {
  if (typeof connection === 'string') return URL.canParse(connection) && /^rediss?:$/.test(new URL(connection).protocol)
  return typeof connection === 'object' && connection !== null && !Array.isArray(connection) &&
    !(connection instanceof Redis) && !('keyPrefix' in connection)
}
