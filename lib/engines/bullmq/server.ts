/** What the engine checks when it starts: the versions of BullMQ and of the server, and the server's settings. */
import { answered, SILENCE_MS, type Client } from './connection.js'
import { isNotSent, plainRedisError } from './redis-errors.js'

/** The lowest BullMQ whose undocumented parts the engine knows, and the first one that it does not know. */
const BULLMQ = { lowest: [6, 7], tooNew: [7] } as const
/** The lowest server that BullMQ recommends. Its own error asks for 5.0, where commands are missing that this engine uses. */
const SERVER = [6, 2] as const
/** Characters from which on a text may be too large for a server: the lowest limit that Redis can have is 1 MB. */
export const LARGE = 300_000
/** What Redis takes if nobody has set another limit. */
const DEFAULT_MAX_BYTES = 536_870_912

/**
 * Checks the installed BullMQ.
 * @param version as BullMQ tells it to each queue, such as `bullmq:6.7.0`
 * @throws if this engine does not know it
 */
export function checkLibrary (version: unknown): void {
  const found = /^bullmq:(\d.*)$/.exec(String(version))?.[1]
  if (found === undefined || (!isLower(found, BULLMQ.lowest) && isLower(found, BULLMQ.tooNew))) return
  throw new Error(`BullMQ ${found} is installed. This engine knows BullMQ from ${BULLMQ.lowest.join('.')} on, and before ${BULLMQ.tooNew.join('.')}`)
}

/** What a server says of itself. */
export interface ServerInfo {
  /** `INFO` for BullMQ, which reads the version from it. */
  readonly text: string
  /** Undefined if it drops nothing when its memory is full, or if that is not known. */
  readonly evictionPolicy: string | undefined
}

/** @throws if the server is too old */
export async function readServer (client: Client): Promise<ServerInfo> {
  let info: string
  try {
    info = String(await answered(SILENCE_MS, client.info()))
  } catch (error) {
    if (!/NOPERM/.test(plainRedisError(error).message)) throw error
    // A user without the right to ask is taken for one of the lowest version.
    return { text: `redis_version:${SERVER.join('.')}.0\r\n`, evictionPolicy: undefined }
  }
  const version = fieldOf(info, 'redis_version')
  // Compatible servers tell a version of Redis, too. Which one they are is told by BullMQ's own fields.
  if (version !== undefined && !/^(?:dragonfly|valkey)_version:/m.test(info) && isLower(version, SERVER)) {
    throw new Error(`The server is Redis ${version}. This engine knows Redis from ${SERVER.join('.')} on`)
  }
  const policy = fieldOf(info, 'maxmemory_policy')
  return {
    // BullMQ would write a line to the console for each queue and worker.
    text: info.replace(/^maxmemory_policy:.*$/m, 'maxmemory_policy:noeviction'),
    evictionPolicy: policy === 'noeviction' ? undefined : policy
  }
}

/** The bytes that one value may have. The server ends the connection that sends more, and with it the jobs and verdicts of others. */
export class SizeLimit {
  readonly #client: Client
  #maxBytes: Promise<number> | undefined

  constructor (client: Client) {
    this.#client = client
  }

  /** @returns why the server will not take this text, or undefined */
  async refusal (what: string, text: string): Promise<string | undefined> {
    const max = await (this.#maxBytes ??= this.#read())
    const bytes = Buffer.byteLength(text)
    return bytes > max ? `${what} has ${bytes} bytes, and the server takes ${max} (proto-max-bulk-len)` : undefined
  }

  async #read (): Promise<number> {
    try {
      const reply = await answered(SILENCE_MS, this.#client.config('GET', 'proto-max-bulk-len'))
      return Number((reply as unknown[])[1]) || DEFAULT_MAX_BYTES
    } catch (error) {
      if (isNotSent(error)) this.#maxBytes = undefined
      // A user may have no right to ask.
      return DEFAULT_MAX_BYTES
    }
  }
}

/** Why a server takes no further connection, as far as it tells. */
export async function whyRefused (client: Client): Promise<string> {
  const info = String(await answered(SILENCE_MS, client.info('clients')).catch(() => ''))
  const [connected, most] = [fieldOf(info, 'connected_clients'), fieldOf(info, 'maxclients')]
  return most !== undefined && Number(connected) >= Number(most) ? `max number of clients reached, maxclients is ${most}` : 'often because the max number of clients is reached'
}

function fieldOf (info: string, name: string): string | undefined {
  return new RegExp(`^${name}:(.*?)\\r?$`, 'm').exec(info)?.[1]
}

function isLower (version: string, than: readonly number[]): boolean {
  const found = version.split('.').map(Number)
  for (const [i, part] of than.entries()) {
    const own = found[i] ?? 0
    if (own !== part) return own < part
  }
  return false
}
