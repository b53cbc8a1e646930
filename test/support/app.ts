import { Writable } from 'node:stream'
import Fastify, { type FastifyInstance, type FastifyServerOptions } from 'fastify'
import backgroundTasks, { type FastifyBackgroundTasksOptions } from '../../lib/index.js'

export interface LogLine {
  level: number
  msg: string
  reqId?: string
  err?: { message: string, code?: string }
  task?: { id: string, name: string }
  reason?: string
  tasks?: unknown
}

interface Test {
  teardown: (fn: () => unknown) => void
}

export interface Started {
  app: FastifyInstance
  logs: LogLine[]
  /** Listens at first use; no route can be added from then on. */
  address: () => Promise<string>
  /** GET over a real socket; resolves to the body. */
  get: (path: string) => Promise<string>
}

/** An app with the plugin, closed at the end of the test. */
export async function start (t: Test, options: FastifyBackgroundTasksOptions = {}, server: FastifyServerOptions = {}): Promise<Started> {
  const { logger, logs } = collectLogs()
  const app = Fastify({ ...server, logger })
  t.teardown(() => app.close())
  await app.register(backgroundTasks, options)
  let listening: Promise<string> | undefined
  const listen = async (): Promise<string> => await (listening ??= app.listen({ port: 0, host: '127.0.0.1' }))
  return {
    app,
    logs,
    address: listen,
    get: async path => await (await fetch(await listen() + path)).text()
  }
}

/** Options for a logger whose lines can be read. */
export function collectLogs (): { logger: { level: string, stream: Writable }, logs: LogLine[] } {
  const logs: LogLine[] = []
  const stream = new Writable({
    write (chunk, _encoding, done) {
      for (const line of String(chunk).trim().split('\n')) logs.push(JSON.parse(line) as LogLine)
      done()
    }
  })
  return { logger: { level: 'debug', stream }, logs }
}

/** A promise to be settled from elsewhere. */
export function deferred (): { promise: Promise<void>, resolve: () => void } {
  let resolve = (): void => {}
  const promise = new Promise<void>(_resolve => { resolve = _resolve })
  return { promise, resolve }
}
