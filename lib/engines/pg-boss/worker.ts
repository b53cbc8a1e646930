import { AsyncResource } from 'node:async_hooks'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Delivery, Job, TaskSpec, Verdict } from '../engine.js'
import { PgBossConsumer } from './consumer.js'
import type { PgBossServer } from './server.js'
import { nextDue, reclaim, touch } from './statements.js'

/** Milliseconds between two searches for jobs that have become due, or that no notification told of. */
const POLL_MS = 500
/** The least milliseconds between two searches. */
const MIN_POLL_MS = 10
/** Milliseconds between two signs of life. After 10 s without one, a job is handed to another process. */
const HEARTBEAT_MS = 2_000
/** Milliseconds after a failure in which other processes can show signs of life again, before any of them counts as dead. */
const GRACE_MS = 5_000

interface DueRow {
  readonly name: string
  readonly ms: number
}

/** Runs the jobs of all queues. It learns of new jobs from notifications, from the delays of jobs that it has seen, and by polling. */
export class PgBossWorker {
  readonly #server: PgBossServer
  readonly #consumers: ReadonlyMap<string, PgBossConsumer>
  // A job does not run in the context of the request that stored it, nor of the request that woke this worker.
  readonly #context = new AsyncResource('BackgroundTasksWorker')
  #pollTimer: NodeJS.Timeout | undefined
  #heartbeatTimer: NodeJS.Timeout | undefined
  #isPolling = false
  #nextPollAt = Infinity
  // The start counts as a failure, because other processes may have been cut off until a moment ago.
  #lastFailureAt = performance.now()
  #isStopped = false
  #subscription: { close(): Promise<void> } | undefined

  constructor (server: PgBossServer, tasks: readonly TaskSpec[], run: (delivery: Delivery) => Promise<Verdict>) {
    this.#server = server
    this.#consumers = new Map(tasks.map(task => [
      task.name,
      new PgBossConsumer(task, server, run, ms => { this.#pollIn(ms) })
    ]))
  }

  /** Never rejects. */
  async start (): Promise<void> {
    await this.#listen()
    this.#heartbeatTimer = setTimeout(() => { void this.#heartbeat() }, HEARTBEAT_MS)
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
    void this.#subscription?.close().catch(() => {})
  }

  /** Learns from pg-boss's channel which queues have new jobs. */
  async #listen (): Promise<void> {
    try {
      const subscription = await this.#server.listen(
        // PGlite calls this in the context of the statement that notified.
        queue => { this.#context.runInAsyncScope(() => this.#consumers.get(queue)?.wake()) },
        () => { this.#pollIn(0) }
      )
      if (this.#isStopped) void subscription?.close().catch(() => {})
      else this.#subscription = subscription
    } catch (error) {
      this.#server.report(error)
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
    for (const { name, ms } of rows) if (ms <= 0) this.#consumers.get(name)?.wake()
    // After the job that is due now another one may follow.
    return Math.min(POLL_MS, ...rows.map(({ ms }) => Math.max(ms, 2 * MIN_POLL_MS)))
  }

  async #heartbeat (): Promise<void> {
    try {
      // This comes first, so that a process that was held up does not count its own jobs as lost.
      const running = Array.from(this.#consumers.values()).flatMap(consumer => consumer.running(HEARTBEAT_MS))
      if (running.length > 0) await this.#server.query(touch(this.#server.schema), [JSON.stringify(running)])
      if (performance.now() - this.#lastFailureAt > GRACE_MS) {
        await this.#server.query(reclaim(this.#server.schema), [Array.from(this.#consumers.keys())])
      }
      if (this.#subscription === undefined) await this.#listen()
    } catch (error) {
      this.#onFailure(error)
    }
    if (!this.#isStopped) this.#heartbeatTimer = setTimeout(() => { void this.#heartbeat() }, HEARTBEAT_MS)
  }

  #onFailure (error: unknown): void {
    this.#lastFailureAt = performance.now()
    this.#server.report(error)
  }
}
