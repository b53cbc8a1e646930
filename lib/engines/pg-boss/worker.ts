import { AsyncResource } from 'node:async_hooks'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Delivery, Job, TaskSpec, Verdict } from '../engine.js'
import { PgBossConsumer } from './consumer.js'
import { EndTeller, WATCHED } from './ends.js'
import { CANCELLED } from './operations.js'
import type { PgBossServer } from './server.js'
import { type Fate, fates, nextDue, reclaim, type Start, touch } from './statements.js'

/** Milliseconds between two searches for jobs that have become due, or that no notification told of. */
const POLL_MS = 500
/** The least milliseconds between two searches. */
const MIN_POLL_MS = 10
/** Milliseconds between two signs of life. After 10 s without one, a job is handed to another process. */
const HEARTBEAT_MS = 2_000
/** The same, while another transaction holds a job: when it lets go, the job has to be touched before anybody finds it twice without a sign of life. */
const HELD_HEARTBEAT_MS = 500
/** Milliseconds after a failure in which other processes can show signs of life again, before any of them counts as dead. */
const GRACE_MS = 5_000

interface DueRow {
  readonly name: string
  /** The time when it is due, as the server counts. */
  readonly at: number
  readonly ms: number
}

interface LostRow {
  readonly id: string
  readonly returned: boolean
}

/** Runs the jobs of all queues. It learns of new jobs from notifications, from the delays of jobs that it has seen, and by polling. */
export class PgBossWorker {
  readonly #server: PgBossServer
  readonly #consumers: ReadonlyMap<string, PgBossConsumer>
  readonly #ends: EndTeller
  // A job does not run in the context of the request that stored it, nor of the request that woke this worker.
  readonly #context = new AsyncResource('BackgroundTasksWorker')
  #pollTimer: NodeJS.Timeout | undefined
  #heartbeatTimer: NodeJS.Timeout | undefined
  #isPolling = false
  #nextPollAt = Infinity
  /** What was due at the last poll, by queue, and after how many milliseconds to look for it again. Another transaction may hold it. */
  #due = new Map<string, { readonly at: number, readonly waitMs: number }>()
  /** Jobs that had no sign of life at the last search. */
  #silent: readonly unknown[] = []
  #nextSearchAt = 0
  // The start counts as a failure, because other processes may have been cut off until a moment ago.
  #lastFailureAt = performance.now()
  #isStopped = false
  #subscription: { close(): Promise<void> } | undefined
  #isSubscribing = false

  constructor (server: PgBossServer, tasks: readonly TaskSpec[], run: (delivery: Delivery) => Promise<Verdict>) {
    this.#server = server
    const ends = this.#ends = new EndTeller(server)
    this.#consumers = new Map(tasks.map(task => [task.name, new PgBossConsumer(task, server, run, ms => { this.#pollIn(ms) }, {
      onMentioned: starts => { void this.#learn(starts, true) },
      onSettled: settlements => { ends.settled(task.name, settlements) }
    })]))
  }

  /** Never rejects. */
  async start (): Promise<void> {
    this.#heartbeatTimer = setTimeout(() => { void this.#heartbeat() }, HEARTBEAT_MS)
    await this.#listen()
    this.#pollIn(0)
  }

  /** This process has stored jobs, so no notification is needed to find them. */
  jobsStored (jobs: readonly Job[]): void {
    this.#context.runInAsyncScope(() => {
      for (const { task, delayMs } of jobs) {
        if (delayMs > 0) this.#pollIn(delayMs)
        else if (this.#subscription === undefined) this.#consumers.get(task)?.wake()
      }
    })
  }

  /** This process has put a job back, so no notification is needed to find it. */
  jobPutBack (task: string): void {
    this.#context.runInAsyncScope(() => this.#consumers.get(task)?.wake())
  }

  /** This process has cancelled a job, so no notification is needed to hear of it. */
  jobCancelled (task: string, id: string): void {
    this.#context.runInAsyncScope(() => this.#consumers.get(task)?.mention(id.toLowerCase()))
  }

  pause (): void {
    for (const consumer of this.#consumers.values()) consumer.pause()
  }

  async stop (drainMs: number): Promise<void> {
    this.pause()
    const late = new AbortController()
    const idle = Promise.all(Array.from(this.#consumers.values(), consumer => consumer.idle()))
    await Promise.race([idle, sleep(drainMs, undefined, { signal: late.signal }).catch(() => {})])
    late.abort()
    this.#isStopped = true
    clearTimeout(this.#pollTimer)
    clearTimeout(this.#heartbeatTimer)
    for (const consumer of this.#consumers.values()) consumer.close()
    // The server closes this connection with its others, whether or not it can close by itself.
    void this.#subscription?.close()
  }

  /** Learns from pg-boss's channel which queues have new jobs. */
  async #listen (): Promise<void> {
    if (this.#isSubscribing || this.#isStopped) return
    this.#isSubscribing = true
    try {
      const subscription = await this.#server.listen(
        this.#server.channel,
        // PGlite calls this in the context of the statement that notified.
        message => { this.#context.runInAsyncScope(() => { this.#heard(message) }) },
        () => { this.#pollIn(0) }
      )
      if (this.#isStopped) void subscription?.close()
      else this.#subscription = subscription
    } catch (error) {
      this.#server.report(error)
    }
    this.#isSubscribing = false
  }

  /** pg-boss itself only sends names of queues. */
  #heard (message: string): void {
    const [what = '', queue = '', id = ''] = message.split(' ')
    if (queue === '') this.#consumers.get(what)?.wake()
    else if (what === CANCELLED) this.#consumers.get(queue)?.mention(id)
    else if (what === WATCHED) this.#ends.watched(queue)
  }

  /** Finds out which of these jobs were cancelled. Never rejects. What fails is found out by the next sign of life. */
  async #learn (starts: readonly Start[], isMentioned: boolean): Promise<void> {
    try {
      const found = await this.#server.query(fates(this.#server.schema), [JSON.stringify(starts)]) as Fate[]
      const fateOf = new Map(found.map(fate => [`${fate.name} ${fate.id}`, fate]))
      for (const start of starts) this.#consumers.get(start.name)?.learn(start, fateOf.get(`${start.name} ${start.id}`), isMentioned)
    } catch (error) {
      this.#onFailure(error)
    }
  }

  /** Polls after so many milliseconds, or earlier if a poll is due earlier. */
  #pollIn (ms: number): void {
    const delay = Math.min(Math.max(ms, MIN_POLL_MS), POLL_MS)
    const at = performance.now() + delay
    if (at >= this.#nextPollAt || this.#isStopped) return
    clearTimeout(this.#pollTimer)
    this.#nextPollAt = at
    this.#pollTimer = setTimeout(() => {
      this.#nextPollAt = Infinity
      void this.#poll()
    }, delay)
  }

  async #poll (): Promise<void> {
    if (this.#isPolling) return this.#pollIn(MIN_POLL_MS)
    this.#isPolling = true
    const names = Array.from(this.#consumers.values()).filter(({ isWaiting }) => isWaiting).map(({ name }) => name)
    try {
      this.#pollIn(names.length > 0 ? await this.#wakeDue(names) : POLL_MS)
    } catch (error) {
      this.#onFailure(error)
      this.#pollIn(POLL_MS)
    }
    this.#isPolling = false
  }

  /** @returns milliseconds until the next job is due */
  async #wakeDue (names: readonly string[]): Promise<number> {
    const rows = await this.#server.query(nextDue(this.#server.schema), [names]) as DueRow[]
    const before = this.#due
    this.#due = new Map()
    let next = POLL_MS
    for (const { name, at, ms } of rows) {
      let waitMs = Math.max(ms, 2 * MIN_POLL_MS)
      if (ms <= 0) {
        // After the job that is due now another one may follow. One that was due before and has not started is looked for ever less often.
        const last = before.get(name)
        if (last?.at === at) waitMs = last.waitMs * 2
        this.#due.set(name, { at, waitMs })
        this.#consumers.get(name)?.wake()
      }
      next = Math.min(next, waitMs)
    }
    return next
  }

  async #heartbeat (): Promise<void> {
    let nextMs = HEARTBEAT_MS
    try {
      // This comes first, so that a process that was held up does not count its own jobs as lost.
      const running = Array.from(this.#consumers.values()).flatMap(consumer => consumer.running(HEARTBEAT_MS))
      if (running.length > 0) {
        const touched = await this.#server.query(touch(this.#server.schema), [JSON.stringify(running)])
        if (touched.length < running.length) {
          nextMs = HELD_HEARTBEAT_MS
          const isTouched = new Set(touched.map(row => (row as { id: unknown }).id))
          await this.#learn(running.filter(({ id }) => !isTouched.has(id)), false)
        }
      }
      const now = performance.now()
      if (now - this.#lastFailureAt > GRACE_MS && now >= this.#nextSearchAt) await this.#returnLost()
    } catch (error) {
      this.#onFailure(error)
    }
    // A server may never answer this.
    if (this.#subscription === undefined) void this.#listen()
    if (!this.#isStopped) this.#heartbeatTimer = setTimeout(() => { void this.#heartbeat() }, nextMs)
  }

  async #returnLost (): Promise<void> {
    const rows = await this.#server.query(reclaim(this.#server.schema), [Array.from(this.#consumers.keys()), this.#silent]) as LostRow[]
    this.#silent = rows.filter(({ returned }) => !returned).map(({ id }) => id)
    if (this.#silent.length < rows.length) this.#pollIn(0)
    this.#nextSearchAt = performance.now() + HEARTBEAT_MS - MIN_POLL_MS
  }

  #onFailure (error: unknown): void {
    this.#lastFailureAt = performance.now()
    this.#silent = []
    this.#server.report(error)
  }
}
