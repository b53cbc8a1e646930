import { AsyncResource } from 'node:async_hooks'
import type { JobRecord } from '../engines/engine.js'
import { attempt } from '../foreign.js'
import { Timer } from '../timers.js'

/** Milliseconds between two looks at all results that are waited for, where somebody tells of ends. Not all of them may be told. */
const LOOK_MS = 500
/** The same, where nobody tells. */
const LOOK_ALONE_MS = 100
/** Milliseconds for which a subscription is kept after the last wait. */
const LINGER_MS = 5_000

/** Where results are read. */
export interface ResultSource {
  readonly read: (task: string, id: string) => Promise<JobRecord | undefined>
  /** Calls back with the ids of tasks that end, until the function that this resolves to is called. Undefined if nobody tells of ends. */
  readonly watch: (task: string, onEnd: (ids: readonly string[]) => void) => Promise<() => void> | undefined
}

/** Waits for the ends of tasks: one subscription for each definition, for as long as somebody waits. */
export class ResultWaits {
  readonly #source: ResultSource
  readonly #watched = new Map<string, WatchedTask>()
  // Many requests share a subscription, so it must not see the `AsyncLocalStorage` stores of the one that asked for it.
  readonly #context = new AsyncResource('BackgroundTasksResults')
  #isClosed = false

  constructor (source: ResultSource) {
    this.#source = source
  }

  /** Resolves to the record of a task when the task has ended. Resolves to undefined when the time is up, or when there is no such task. */
  async wait (task: string, id: string, ms: number): Promise<JobRecord | undefined> {
    if (this.#isClosed) return undefined
    let watched = this.#watched.get(task)
    if (watched === undefined) {
      watched = this.#context.runInAsyncScope(() => new WatchedTask(task, this.#source, () => { this.#watched.delete(task) }))
      this.#watched.set(task, watched)
    }
    this.#context.runInAsyncScope(() => { watched.start() })
    return await watched.wait(id, ms)
  }

  /** Ends all waits. Later ones end immediately. */
  close (): void {
    this.#isClosed = true
    for (const watched of this.#watched.values()) watched.close()
  }
}

/** The waits for tasks of one definition. */
class WatchedTask {
  readonly #task: string
  readonly #source: ResultSource
  readonly #onClose: () => void
  readonly #waits = new Map<string, Set<(record: JobRecord | undefined) => void>>()
  readonly #subscribed: Promise<unknown>
  #unsubscribe: (() => void) | undefined
  #lookMs = LOOK_ALONE_MS
  #looks: Timer | undefined
  #isLooking = false
  #linger: Timer | undefined
  #isClosed = false

  constructor (task: string, source: ResultSource, onClose: () => void) {
    this.#task = task
    this.#source = source
    this.#onClose = onClose
    this.#subscribed = this.#subscribe()
  }

  /** Somebody is about to wait. */
  start (): void {
    this.#linger?.clear()
    this.#linger = undefined
    // A look that is under way is followed by the next one.
    if (!this.#isLooking) this.#looks ??= new Timer(() => { void this.#lookAtAll() }, this.#lookMs)
  }

  async wait (id: string, ms: number): Promise<JobRecord | undefined> {
    let resolve!: (record: JobRecord | undefined) => void
    const end = new Promise<JobRecord | undefined>(_resolve => { resolve = _resolve })
    const waits = this.#waits.get(id)
    if (waits === undefined) this.#waits.set(id, new Set([resolve]))
    else waits.add(resolve)
    const timer = new Timer(() => { resolve(undefined) }, ms)
    // The task may have ended before anybody told of ends.
    void this.#subscribed.then(async () => { await this.#look(id) })
    try {
      return await end
    } finally {
      timer.clear()
      this.#leave(id, resolve)
    }
  }

  close (): void {
    this.#isClosed = true
    this.#looks?.clear()
    this.#linger?.clear()
    if (this.#unsubscribe !== undefined) attempt(this.#unsubscribe)
    this.#onClose()
    for (const id of this.#waits.keys()) this.#end(id, undefined)
  }

  /** Never rejects. Whoever cannot be told of ends looks for them. */
  async #subscribe (): Promise<void> {
    try {
      const unsubscribe = await this.#source.watch(this.#task, ids => {
        for (const id of ids) void this.#look(id)
      })
      if (unsubscribe === undefined) return
      this.#unsubscribe = unsubscribe
      this.#lookMs = LOOK_MS
      if (this.#isClosed) attempt(unsubscribe)
    } catch {
      // The looks go on as if there were no such word.
    }
  }

  /** Never rejects. */
  async #look (id: string): Promise<void> {
    if (!this.#waits.has(id)) return
    try {
      const record = await this.#source.read(this.#task, id)
      if (record === undefined || hasEnded(record)) this.#end(id, record)
    } catch {
      // The engine may be away for a moment. There will be another look.
    }
  }

  async #lookAtAll (): Promise<void> {
    this.#looks = undefined
    this.#isLooking = true
    await Promise.all(Array.from(this.#waits.keys(), async id => { await this.#look(id) }))
    this.#isLooking = false
    if (this.#waits.size > 0) this.start()
  }

  #end (id: string, record: JobRecord | undefined): void {
    for (const resolve of this.#waits.get(id) ?? []) resolve(record)
  }

  #leave (id: string, resolve: (record: JobRecord | undefined) => void): void {
    const waits = this.#waits.get(id)
    waits?.delete(resolve)
    if (waits?.size === 0) this.#waits.delete(id)
    if (this.#waits.size > 0 || this.#isClosed) return
    this.#looks?.clear()
    this.#looks = undefined
    this.#linger = new Timer(() => { this.close() }, LINGER_MS)
  }
}

/** Whether nothing follows in the state of a record. */
export function hasEnded ({ state }: JobRecord): boolean {
  return state === 'succeeded' || state === 'failed' || state === 'skipped' || state === 'abandoned'
}
