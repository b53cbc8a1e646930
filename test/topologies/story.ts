/**
 * The story of all topologies: an app stores and runs jobs under load, something breaks, and the app goes on without a restart. Counted: every job that
 * was answered with a 202 runs.
 */
import type { Test } from 'tap'
import { count, ran, startLoad, startService, until, type EngineName, type Load, type Service, type ServiceLine } from '../support/services.js'

export interface Topology {
  /** What breaks, as the row calls it. */
  readonly name: string
  readonly engine: EngineName
  /** As the engine takes them, but JSON. */
  readonly options: object
  /**
   * Resolves when no fault can lose what was answered before. Where replication is asynchronous, what is sent between this and the end of the fault can
   * be lost: it is counted, and no error. Without it, nothing may be lost.
   */
  readonly replicated?: () => Promise<void>
  /** Resolves when it has happened. Jobs are stored meanwhile. */
  readonly fault: () => Promise<unknown>
  /** Nothing can be stored at first, until `fault` has happened. */
  readonly isDownAtStart?: boolean
  /** Most milliseconds from the beginning of the fault until all jobs are stored again. */
  readonly writableWithin: number
}

/** Jobs that are stored without a refusal before the server counts as writable. */
const STREAK = 200
/** Milliseconds in which everything that was accepted has to run: a node of RabbitMQ that was paused is missed after a minute, with the jobs that it has delivered. */
const RUN_MS = 90_000
const CLIENTS = 5

export async function story (t: Test, topology: Topology): Promise<void> {
  const { name, engine, options, replicated, fault, isDownAtStart = false, writableWithin } = topology
  const app = await startService(t, { engine, options, isWorker: true })
  const load = startLoad(() => app.address, CLIENTS, 5)
  t.teardown(() => load.stop())
  if (isDownAtStart) await until(() => load.refused.size > CLIENTS, 'jobs are refused', 20_000)
  else await until(() => load.acceptedSince > STREAK, 'jobs are stored before anything breaks', 30_000)
  const unknownBefore = load.unknown.size
  const linesBefore = app.lines.length

  const safe = new Set(load.accepted)
  await replicated?.()
  const from = Date.now()
  await fault()
  const happened = Date.now()
  // The answer to a request that was stored before may come later.
  const sent = load.sent
  const before = load.accepted.size
  await until(() => load.accepted.size > before + STREAK && load.acceptedSince > STREAK, 'jobs are stored again', writableWithin + 20_000).catch((error: unknown) => {
    const { accepted, refused, acceptedSince } = load
    throw new Error(`${String(error)}. Accepted: ${accepted.size}, ${before} of them before, ${acceptedSince} at last. Refused: ${refused.size}. ${lastOf(app)}`)
  })
  const seconds = Math.max(0, load.interruptedUntil - from) / 1000
  await load.stop()
  const atRisk = new Set(replicated === undefined ? [] : [...load.accepted].filter(n => n < sent && !safe.has(n)))
  t.ok(seconds * 1000 <= writableWithin, `stored again after ${seconds} s`)
  t.equal(load.unknown.size, unknownBefore, 'the app itself always answers')

  const lost = await lostOf(app, load, atRisk)
  t.equal(lost.filter(n => !atRisk.has(n)).length, 0, 'what was answered with a 202 runs')
  const doubled = app.started.length - new Set(app.started.map(({ n }) => n)).size
  const warnings = app.lines.slice(linesBefore).filter(({ level }) => level === 40)
  t.strictSame(repeated(warnings), [], 'an outage is one warning for each message')
  const closing = Date.now()
  await app.stop()
  t.equal(app.process.exitCode, 0, 'the process ends by itself')
  t.ok(Date.now() - closing < 8_000, `the app closes: ${Date.now() - closing} ms`)
  for (const { msg } of warnings) t.comment(`warning: ${msg}`)
  // To stderr, which no reporter leaves out: topology | 202s | lost | doubled | seconds until writable again
  console.error(`# ${name} | ${load.accepted.size} | ${lost.length}${replicated === undefined ? '' : ` (of ${atRisk.size} at risk)`} | ${doubled} | ${seconds.toFixed(1)} (fault ${((happened - from) / 1000).toFixed(1)})`)
}

export interface Refusal {
  readonly engine: EngineName
  readonly options: object
  /** What the log says about it. */
  readonly reason: RegExp
  /** What it never says. */
  readonly secret: string
}

/** The server does not let the app in: jobs are refused with the reason in the log, and the app closes. */
export async function refused (t: Test, { engine, options, reason, secret }: Refusal): Promise<void> {
  const app = await startService(t, { engine, options, isWorker: true })
  const { status } = await fetch(`${app.address}/note/0`, { method: 'POST' })
  t.equal(status, 503)
  await until(() => app.lines.some(({ level, msg }) => level === 40 && reason.test(msg)), '', 5_000).catch(() => {})
  const warnings = app.lines.filter(({ level }) => level === 40)
  t.match(warnings.map(({ msg }) => msg).join('\n'), reason)
  t.notOk(JSON.stringify(app.lines).includes(secret), 'no password is logged')
  await app.stop()
  t.equal(app.process.exitCode, 0, 'the process ends by itself')
}

/** The numbers of the jobs that were accepted and do not run. */
async function lostOf (app: Service, { accepted }: Load, atRisk: Set<number>): Promise<number[]> {
  const safe = new Set([...accepted].filter(n => !atRisk.has(n)))
  await until(() => ran(app, safe), '', RUN_MS).catch(() => {})
  await until(() => ran(app, accepted), '', 10_000).catch(() => {})
  if (count(app, accepted) === accepted.size) return []
  const started = new Set(app.started.map(({ n }) => n))
  return [...accepted].filter(n => !started.has(n))
}

function repeated (lines: ServiceLine[]): string[] {
  const messages = lines.map(({ msg }) => msg)
  return messages.filter((msg, i) => messages.indexOf(msg) !== i)
}

function lastOf ({ lines }: Service): string {
  return lines.findLast(({ level }) => level === 40)?.msg ?? 'no warning'
}
