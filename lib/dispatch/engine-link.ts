import type { FastifyBaseLogger } from 'fastify'
import { FST_BGT_INVALID_OPTION, PACKAGE, unavailable } from '../errors.js'
import { attempt, readOr } from '../foreign.js'
import { within } from '../limits.js'
import { messageOf } from '../engines/plain-error.js'
import type { Delivery, Job, Receipt, TaskEngine, TaskSpec, Verdict } from '../engines/engine.js'
import { Deadlines, type Deadline } from './deadlines.js'
import { GroupCommit } from './group-commit.js'

/** Milliseconds between two attempts to start an engine. */
const RESTART_MS = 500
/** Milliseconds in which the engine tells its server the last verdicts, at the end of the drain. */
const STOP_MS = 1_000
/** Milliseconds after which a message is logged again, if it was not heard of meanwhile. It is heard of all the time while an outage lasts. */
const OUTAGE_MS = 30_000
/** Most messages that are remembered. */
const MAX_HEARD = 100

/** The codes of mistakes of whoever adds the task or starts the app, which say nothing about the engine. An engine of somebody else has only the codes. */
const MISTAKES: readonly unknown[] = ['FST_BGT_INVALID_PAYLOAD', 'FST_BGT_INVALID_OPTION']

/** The engines that an app has started and not stopped. */
const started = new WeakSet<TaskEngine<unknown>>()

export interface EngineLinkOptions {
  readonly engine: TaskEngine<unknown>
  readonly tasks: readonly TaskSpec[]
  readonly log: FastifyBaseLogger
  /** Milliseconds for storing, connecting included. */
  readonly enqueueTimeout: number
  /** Skips a task that the engine has delivered. */
  readonly cancelled: (task: string, id: string) => void
  /** Runs what the engine delivers. Undefined in a process that only stores. */
  readonly run: ((delivery: Delivery) => Promise<Verdict>) | undefined
}

/**
 * The app's link to its engine, whose server may be unavailable at any time. Jobs that are to be stored wait for the engine until
 * `enqueueTimeout` has passed.
 */
export class EngineLink {
  readonly engine: TaskEngine<unknown>
  readonly #options: EngineLinkOptions
  readonly #groups: GroupCommit | undefined
  readonly #deadlines: Deadlines
  #isConnected = false
  #isConsuming = false
  #isPaused = false
  #isStopping = false
  #lastError = 'it has not been reached yet'
  /** Messages that were logged, with the time by `performance.now()` when each was last heard of. */
  readonly #heard = new Map<string, number>()
  #whenConnected: Promise<void>
  #connected!: () => void
  #wakeUp: (() => void) | undefined
  #starting: Promise<void> | undefined
  readonly #whenReady: Promise<void>
  #isReady!: () => void

  /** @throws FST_BGT_INVALID_OPTION if another app has started the engine */
  constructor (options: EngineLinkOptions) {
    refuseStarted(options.engine)
    this.#options = options
    this.engine = options.engine
    this.#deadlines = new Deadlines(options.enqueueTimeout, () => this.#unavailable(this.#late('the jobs were not stored')))
    this.#groups = options.engine.groups ? new GroupCommit(async jobs => await this.engine.enqueue(jobs)) : undefined
    this.#whenConnected = new Promise(resolve => { this.#connected = resolve })
    this.#whenReady = new Promise(resolve => { this.#isReady = resolve })
  }

  /** The app is ready: jobs may run. */
  ready (): void {
    this.#isReady()
  }

  /**
   * Connects, and goes on trying. Resolves when the engine is connected, and at the latest after `enqueueTimeout`.
   * @throws FST_BGT_INVALID_OPTION if another app has started the engine
   */
  async start (): Promise<void> {
    if (this.#isStopping) return
    this.#connect()
    const isConnected = await within(this.#options.enqueueTimeout, this.#whenConnected.then(() => true), () => false)
    if (isConnected) return
    const { log, enqueueTimeout } = this.#options
    attempt(() => {
      log.warn(`background task engine "${this.engine.name}" is not available after ${enqueueTimeout} ms (${this.#lastError}): the app starts, and goes on trying`)
    })
  }

  /**
   * Stores jobs. This makes few promises, because every request with jobs waits for it.
   * @throws FST_BGT_ENGINE_UNAVAILABLE
   * @throws FST_BGT_INVALID_PAYLOAD if the engine can never store one of them
   */
  enqueue (jobs: readonly Job[], tx?: unknown): Promise<Receipt[]> {
    return new Promise((resolve, reject) => {
      const deadline = this.#deadlines.set(reject)
      const failed = (error: unknown): void => {
        this.#deadlines.met(deadline)
        reject(this.#unavailable(error))
      }
      try {
        this.#enqueue(jobs, tx, deadline).then(receipts => {
          this.#deadlines.met(deadline)
          resolve(receipts)
        }, failed)
      } catch (error) {
        // An engine may throw instead of returning a promise.
        failed(error)
      }
    })
  }

  /** Whether the engine can be reached now. */
  get isConnected (): boolean {
    return this.#isConnected && !this.#isStopping && readOr(false, () => this.engine.isConnected !== false)
  }

  /** The last message that was logged of the engine. */
  get lastError (): string {
    return this.#lastError
  }

  /** The names of the definitions whose jobs this process takes. */
  get consuming (): string[] {
    if (!this.#isConsuming || this.#isPaused) return []
    return this.#options.tasks.filter(({ concurrency }) => concurrency > 0).map(({ name }) => name)
  }

  /**
   * Asks the engine something.
   * @throws FST_BGT_ENGINE_UNAVAILABLE
   */
  async ask<T> (question: (engine: TaskEngine<unknown>) => Promise<T>): Promise<T> {
    try {
      return await within(this.#options.enqueueTimeout, this.#ask(question), () => {
        throw this.#late('it did not answer')
      })
    } catch (error) {
      throw this.#unavailable(error)
    }
  }

  /** Takes no further jobs. */
  async pause (): Promise<void> {
    // The engine may connect during the drain.
    this.#isPaused = true
    if (this.#isConnected && this.#options.run !== undefined) await this.#quietly('pause', () => this.engine.pause())
  }

  /** Closes the connections, when the verdicts of all running jobs have been reported. */
  async stop (): Promise<void> {
    this.#isStopping = true
    this.#lastError = 'the app is closed'
    if (this.#starting === undefined) return
    this.#isReady()
    this.#wakeUp?.()
    const stop = (): Promise<void> => this.#quietly('stop', () => this.engine.stop({ drainMs: STOP_MS }))
    // A start may hang for as long as its server does not answer.
    if (!this.#isConnected) void stop()
    const stopped = Promise.resolve(this.#starting).then(stop)
    await within(1.5 * STOP_MS, stopped, () => undefined)
    // Whoever still waits for the engine waits in vain.
    this.#deadlines.expireAll()
    started.delete(this.engine)
  }

  #enqueue (jobs: readonly Job[], tx: unknown, deadline: Deadline): Promise<Receipt[]> {
    // Jobs whose request was answered with a 503 must not be stored when the engine comes back.
    if (!this.#isConnected) {
      this.#connect()
      return this.#whenConnected.then(() => deadline.isOver ? [] : this.#store(jobs, tx, deadline))
    }
    return this.#store(jobs, tx, deadline)
  }

  #store (jobs: readonly Job[], tx: unknown, deadline: Deadline): Promise<Receipt[]> {
    if (tx !== undefined) return this.engine.enqueue(jobs, { tx })
    return this.#groups === undefined ? this.engine.enqueue(jobs) : this.#groups.enqueue(jobs, deadline)
  }

  async #ask<T> (question: (engine: TaskEngine<unknown>) => Promise<T>): Promise<T> {
    if (!this.#isConnected) {
      this.#connect()
      await this.#whenConnected
    }
    return await question(this.engine)
  }

  /** Connects once: at the first use, or when the app is ready. */
  #connect (): void {
    if (this.#starting !== undefined) return
    refuseStarted(this.engine)
    started.add(this.engine)
    this.#starting = this.#keepStarting()
  }

  async #keepStarting (): Promise<void> {
    const { log, tasks, run, cancelled } = this.#options
    const events = { log, error: (error: Error): void => { this.#warn(error) }, cancelled }
    while (!this.#isStopping) {
      try {
        if (!this.#isConnected) await this.engine.start(tasks, events)
        if (!this.#isConnected) attempt(() => { log.info(`background task engine "${this.engine.name}" is connected`) })
        this.#isConnected = true
        this.#connected()
        await this.#whenReady
        if (run !== undefined && !this.#isPaused) await this.engine.consume(run)
        this.#isConsuming = run !== undefined
        return
      } catch (error) {
        this.#warn(error)
        await this.#pause(RESTART_MS)
      }
    }
  }

  #unavailable (error: unknown): Error {
    if (isMistake(error)) return error
    return unavailable(this.engine.name, messageOf(error))
  }

  #late (what: string): Error {
    const why = this.#isConnected ? '' : ` (${this.#lastError})`
    return new Error(`${what} within enqueueTimeout, ${this.#options.enqueueTimeout} ms${why}`)
  }

  async #pause (ms: number): Promise<void> {
    await new Promise<void>(resolve => {
      const timer = setTimeout(resolve, ms)
      this.#wakeUp = () => { clearTimeout(timer); resolve() }
    })
  }

  /** Logs an error, once for each outage. Only its message is logged, because the error can carry commands and payloads. */
  #warn (error: unknown): void {
    if (this.#isStopping) return
    const message = messageOf(error)
    this.#lastError = message
    const now = performance.now()
    const heardAt = this.#heard.get(message) ?? -Infinity
    if (this.#heard.size >= MAX_HEARD) this.#heard.clear()
    this.#heard.set(message, now)
    if (now - heardAt < OUTAGE_MS) return
    attempt(() => { this.#options.log.warn(`background task engine "${this.engine.name}": ${message}`) })
  }

  async #quietly (what: string, call: () => Promise<void>): Promise<void> {
    try {
      await call()
    } catch (error) {
      attempt(() => { this.#options.log.warn(`background task engine "${this.engine.name}" failed to ${what}: ${messageOf(error)}`) })
    }
  }
}

/** @throws FST_BGT_INVALID_OPTION */
function refuseStarted (engine: TaskEngine<unknown>): void {
  if (!started.has(engine)) return
  throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: The option "engine" accepts an engine that no other app uses. Make one for each app, or close the other app first`)
}

function isMistake (error: unknown): error is Error {
  return readOr(false, () => MISTAKES.includes((error as { readonly code?: unknown }).code))
}
