/** The options of `rabbitmq()`, checked at the call. */
import type { SocketOptions } from 'amqplib'
import { FST_BGT_INVALID_OPTION } from '../../errors.js'
import { check, NAME, SECRET_OBJECT, type Rules } from '../../rules.js'

/** Options of `rabbitmq()`. A wrong value throws `FST_BGT_INVALID_OPTION` there. */
export interface RabbitMqOptions {
  /**
   * The server: an `amqp:` or `amqps:` URL with a host, or a list of them for the nodes of one cluster. The first attempt takes a random one
   * of the list, and each further attempt the next one. The parameters of a URL are `heartbeat`, `frameMax`, `channelMax`, `maxFrameSize`
   * and `locale`. `heartbeat` (4 seconds if there is none) says how long either side waits for a sign of life of the other: two to three
   * times as long.
   * @default 'amqp://guest:guest@127.0.0.1:5672'
   */
  readonly url?: string | readonly string[] | undefined

  /**
   * What the names of all queues begin with: the queue of the task `send-email` is `fbt.send-email`.
   * @default 'fbt'
   */
  readonly prefix?: string | undefined

  /** Other options of amqplib's `connect`: `ca`, `cert`, `key`, `credentials`, `clientProperties`, … What belongs in the URL is refused. */
  readonly options?: SocketOptions | undefined
}

const RULES: Rules = {
  url: { accepts: 'an amqp: or amqps: URL with a host, or an array of such URLs that is not empty', test: isUrls, isSecret: true },
  prefix: NAME,
  options: SECRET_OBJECT
}

/** Seconds. A process whose event loop is blocked for twice as long loses its connection, and the server starts its jobs elsewhere. */
const HEARTBEAT = '4'
/** The parameters that amqplib reads, with the least value of each, 0 apart. It ignores all others. */
const PARAMETERS: ReadonlyMap<string, number> = new Map([['heartbeat', 1], ['frameMax', 4_096], ['maxFrameSize', 4_096], ['channelMax', 1]])
/** What amqplib takes from the URL, and would ignore here. */
const OF_URL = new Set(['protocol', 'host', 'hostname', 'port', 'username', 'password', 'vhost', 'locale', 'heartbeat', 'frameMax', 'channelMax', 'maxFrameSize'])

/** @throws FST_BGT_INVALID_OPTION */
export function checkOptions (options: RabbitMqOptions): void {
  check('rabbitmq', options, RULES)
  for (const url of urlsOf(options)) checkParameters(new URL(url).searchParams)
  for (const name of Object.keys(options.options ?? {})) {
    if (name === 'recovery') refuse('The option "options" of rabbitmq does not accept "recovery": the engine restores its connections')
    if (name === 'signal') refuse('The option "options" of rabbitmq does not accept "signal": the engine closes its connections')
    if (OF_URL.has(name)) refuse(`The option "options" of rabbitmq does not accept "${name}": it belongs in the URL`)
  }
}

/** The URLs, with a heartbeat. */
export function urlsOf ({ url = 'amqp://guest:guest@127.0.0.1:5672' }: RabbitMqOptions): string[] {
  return (typeof url === 'string' ? [url] : url).map(text => {
    const parsed = new URL(text)
    if (!parsed.searchParams.has('heartbeat')) parsed.searchParams.set('heartbeat', HEARTBEAT)
    return parsed.href
  })
}

function checkParameters (parameters: URLSearchParams): void {
  for (const [name, value] of parameters) {
    if (name === 'locale') continue
    const least = PARAMETERS.get(name)
    // Neither the name nor the value is shown: a password with a "?" in it would be both.
    if (least === undefined) refuse(`A URL of rabbitmq has a parameter that does not exist; it accepts ${[...PARAMETERS.keys(), 'locale'].join(', ')}`)
    if (!/^\d{1,9}$/.test(value) || (Number(value) !== 0 && Number(value) < least)) refuse(`The parameter "${name}" of a URL of rabbitmq accepts 0, or an integer of at least ${least}`)
  }
}

function isUrls (found: unknown): boolean {
  return isUrl(found) || (Array.isArray(found) && found.length > 0 && Array.from(found).every(isUrl))
}

function isUrl (found: unknown): boolean {
  if (typeof found !== 'string' || !URL.canParse(found)) return false
  const { protocol, hostname } = new URL(found)
  return /^amqps?:$/.test(protocol) && hostname !== ''
}

function refuse (message: string): never {
  throw new FST_BGT_INVALID_OPTION(message)
}
