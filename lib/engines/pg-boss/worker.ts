import { AsyncResource } from 'node:async_hooks'
import { setTimeout as sleep } from 'node:timers/promises'
import type { Delivery, Job, TaskSpec, Verdict } from '../engine.js'
import { PgBossConsumer } from './consumer.js'
import type { PgBossServer } from './server.js'
import { nextDue, reclaim } from './statements.js'

/** Milliseconds between two looks for jobs that have become due, or that no notification told of. */
const POLL_MS = 500
/** Milliseconds between two looks at least. */
const LOOK_MS = 10
/** Milliseconds between two signs of life; without one for 10 s, a job is another process's. */
const BEAT_MS = 2_000
/** After a failure, the living have so many milliseconds to show signs of life before the dead are told from them. */
const GRACE_MS = 5_000

interface DueRow {
  readonly name: string
  readonly ms: number
}

/** Runs the jobs of all queues, and knows when there are some: by notification, by timer, by looking. */
export class PgBossWorker {
  readonly #server: PgBossServer
  readonly #consumers: ReadonlyMap<string, PgBossConsumer>
  // Jobs run in no request's context, whoever stored the job that woke them.
  readonly #context = new AsyncResource('BackgroundTasksWorker')
  #look: NodeJS.Timeout | undefined
  #beat: NodeJS.Timeout | undefined
  #isLooking = false
  #looksAt = Infinity
  // Other processes may have been cut off until a moment ago, too.
  #failedAt = performance.now()
  #subscription: { close(): Promise<void> } | undefined

  constructor (server: PgBossServer, tasks: readonly TaskSpec[], run: (delivery: Delivery) => Promise<Verdict>) {
    this.#server = server
    this.#consumers = new Map(tasks.map(task => [
      task.name,
      new PgBossConsumer(task, server, run, ms => { this.#lookIn(ms) })
    ]))
  }

  /** Never rejects. */
  async start (): Promise<void> {
    await this.#listen()
    this.#beat = setTimeout(() => { void this.#keepAlive() }, BEAT_MS)
    this.#lookIn(POLL_MS)
    this.#wakeAll()
  }

  /** Jobs were stored here: there need be no notification to find them. */
  added (jobs: readonly Job[]): void {
    this.#context.runInAsyncScope(() => {
      for (const { task, delayMs } of jobs) {
        if (delayMs > 0) this.#lookIn(delayMs)
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
    clearTimeout(this.#look)
    clearTimeout(this.#beat)
    for (const consumer of this.#consumers.values()) consumer.close()
    // It is ended with the other connections, whether or not this one can say goodbye.
    void this.#subscription?.close().catch(() => {})
  }

  #wakeAll (): void {
    for (const consumer of this.#consumers.values()) consumer.wake()
  }

  /** The channel of pg-boss, over a connection of its own that it restores by itself. */
  async #listen (): Promise<void> {
    try {
      this.#subscription = await this.#server.ask(async boss => await boss.getDb().listen?.(
        this.#server.channel,
        // PGlite notifies in the context of the statement that did.
        queue => { this.#context.runInAsyncScope(() => this.#consumers.get(queue)?.wake()) },
        () => { this.#wakeAll() }
      ))
    } catch (error) {
      this.#server.report(error)
    }
  }

  /** Looks in so many milliseconds, or at the next poll, if that is before. */
  #lookIn (ms: number): void {
    const delay = Math.min(Math.max(ms, LOOK_MS), POLL_MS)
    const at = performance.now() + delay
    if (at >= this.#looksAt || this.#server.closing.aborted) return
    clearTimeout(this.#look)
    this.#looksAt = at
    this.#look = setTimeout(() => {
      this.#looksAt = Infinity
      void this.#lookNow()
    }, delay)
  }

  async #lookNow (): Promise<void> {
    if (this.#isLooking) return this.#lookIn(LOOK_MS)
    this.#isLooking = true
    const names = Array.from(this.#consumers.values()).filter(({ isWaiting }) => isWaiting).map(({ name }) => name)
    try {
      this.#lookIn(names.length > 0 ? await this.#wakeDue(names) : POLL_MS)
    } catch (error) {
      this.#fail(error)
      this.#lookIn(POLL_MS)
    }
    this.#isLooking = false
  }

  /** @returns milliseconds until the next job is due */
  async #wakeDue (names: readonly string[]): Promise<number> {
    const rows = await this.#server.query(nextDue(this.#server.schema), [names]) as DueRow[]
    for (const { name, ms } of rows) if (ms <= 0) this.#consumers.get(name)?.wake()
    // Behind one that is due now there may be another.
    return Math.min(POLL_MS, ...rows.map(({ ms }) => Math.max(ms, 2 * LOOK_MS)))
  }

  async #keepAlive (): Promise<void> {
    try {
      // First of all, so that a process that was held up does not take its own jobs for dead.
      await Promise.all(Array.from(this.#consumers.values(), consumer => consumer.touch(BEAT_MS)))
      if (performance.now() - this.#failedAt > GRACE_MS) {
        await this.#server.query(reclaim(this.#server.schema), [Array.from(this.#consumers.keys())])
      }
      if (this.#subscription === undefined) await this.#listen()
    } catch (error) {
      this.#fail(error)
    }
    if (!this.#server.closing.aborted) this.#beat = setTimeout(() => { void this.#keepAlive() }, BEAT_MS)
  }

  #fail (error: unknown): void {
    this.#failedAt = performance.now()
    this.#server.report(error)
  }
}
