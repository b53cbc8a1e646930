/** Services in processes of their own that can be killed, and clients that count what they are answered. */
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import type { Test } from 'tap'

const SERVICE = fileURLToPath(new URL('engine-service.js', import.meta.url))

export type EngineName = 'bullmq' | 'pg-boss' | 'rabbitmq'

type ServiceMessage =
  | { address: string }
  | { started: number, id: string, attempt: number }
  | { failed: number, attempts: number }
  | { line: ServiceLine }

/** A line of its log, from warnings up. */
export interface ServiceLine {
  readonly level: number
  readonly msg: string
}

export interface Service {
  readonly address: string
  readonly process: ChildProcess
  readonly started: Array<{ n: number, attempt: number }>
  readonly failed: Array<{ n: number, attempts: number }>
  readonly lines: ServiceLine[]
  kill: () => Promise<void>
  /** Closes the app. Resolves when the process has ended by itself. */
  stop: () => Promise<void>
}

export interface ServiceOptions {
  readonly engine: EngineName
  /** As `bullmq()`, `pgBoss()` or `rabbitmq()` takes them, but JSON. */
  readonly options: object
  readonly isWorker: boolean
}

/** @param place a prefix, or a schema */
export function optionsOf (engine: EngineName, url: string, place: string): object {
  if (engine === 'bullmq') return { connection: url, prefix: place }
  return engine === 'rabbitmq' ? { url, prefix: place } : { connectionString: url, schema: place }
}

/** It loads the built package. */
export async function startService (t: Test, { engine, options, isWorker }: ServiceOptions): Promise<Service> {
  // `env`, for tap gives its loaders to every process that is started here, by NODE_OPTIONS.
  const child = spawn('env', ['-u', 'NODE_OPTIONS', process.execPath, SERVICE], {
    stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
    env: { ...process.env, ENGINE: engine, OPTIONS: JSON.stringify(options), WORKER: String(isWorker) }
  })
  const started: Service['started'] = []
  const failed: Service['failed'] = []
  const lines: Service['lines'] = []
  const exit = once(child, 'exit')
  const address = await new Promise<string>((resolve, reject) => {
    child.once('exit', () => { reject(new Error('the service has ended')) })
    child.on('message', (message: ServiceMessage) => {
      if ('address' in message) resolve(message.address)
      if ('started' in message) started.push({ n: message.started, attempt: message.attempt })
      if ('failed' in message) failed.push({ n: message.failed, attempts: message.attempts })
      if ('line' in message) lines.push(message.line)
    })
  })
  const end = async (signal: NodeJS.Signals): Promise<void> => {
    child.kill(signal)
    await exit
  }
  t.teardown(() => end('SIGKILL'))
  return { address, process: child, started, failed, lines, kill: () => end('SIGKILL'), stop: () => end('SIGTERM') }
}

/** How many of the numbers have run. */
export function count ({ started }: Service, numbers: Set<number>): number {
  const ran = new Set(started.map(({ n }) => n))
  return [...numbers].filter(n => ran.has(n)).length
}

export function ran (service: Service, numbers: Set<number>): boolean {
  return count(service, numbers) === numbers.size
}

export interface Load {
  /** How many requests were sent. Their numbers count from 0. */
  readonly sent: number
  /** The numbers of the jobs that were answered with a 202. */
  readonly accepted: Set<number>
  /** With a 503. */
  readonly refused: Set<number>
  /** With anything else, or not within 10 s. */
  readonly unknown: Set<number>
  /** When an answer came last that was no 202, or a 202 after half a second without any: milliseconds since the epoch. */
  readonly interruptedUntil: number
  /** How many 202s there were since then. */
  readonly acceptedSince: number
  stop: () => Promise<Load>
}

/** Milliseconds without a 202 that count as an interruption. */
const STALL_MS = 500

/** Posts jobs from several clients, until told to stop. */
export function startLoad (address: () => string, clients: number, pauseMs = 2): Load {
  const [accepted, refused, unknown] = [new Set<number>(), new Set<number>(), new Set<number>()]
  const state = { isOver: false }
  let lastAcceptedAt = Date.now()
  const client = async (): Promise<void> => {
    while (!state.isOver) {
      const n = load.sent++
      const status = await fetch(`${address()}/note/${n}`, { method: 'POST', signal: AbortSignal.timeout(10_000) }).then(({ status }) => status, () => 0)
      const now = Date.now()
      if (status !== 202 || now - lastAcceptedAt > STALL_MS) {
        load.interruptedUntil = now
        load.acceptedSince = 0
      }
      if (status === 202) {
        accepted.add(n)
        lastAcceptedAt = now
        load.acceptedSince++
      } else {
        (status === 503 ? refused : unknown).add(n)
      }
      await sleep(pauseMs)
    }
  }
  const load = {
    sent: 0,
    accepted,
    refused,
    unknown,
    interruptedUntil: 0,
    acceptedSince: 0,
    async stop () {
      state.isOver = true
      await done
      return load
    }
  }
  const done = Promise.all(Array.from({ length: clients }, client))
  return load
}

/** @param what stands in the error, if it is not so within that time */
export async function until (isSo: () => boolean | Promise<boolean>, what = '', ms = Infinity): Promise<void> {
  const from = Date.now()
  while (!await isSo()) {
    if (Date.now() - from > ms) throw new Error(`not within ${ms / 1000} s: ${what}`)
    await sleep(20)
  }
}
