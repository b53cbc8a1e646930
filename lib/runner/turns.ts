import { AsyncResource } from 'node:async_hooks'
import { Queue } from '../queue.js'
import type { TaskList } from '../tasks/task-list.js'

/** The `setImmediate` of Node. Tests may put a clock of their own in its place, and tasks go on all the same. */
const nextTurn = setImmediate
/** Milliseconds of one turn of the event loop that tasks may use before everything else has its chance. */
const TURN_MS = 4
/**
 * Milliseconds below which a task is short. Short tasks are timed in groups of `SHORT_RUN`, because reading the clock costs as much as one
 * of them.
 */
const SHORT_MS = 0.05
const SHORT_RUN = 8

/**
 * Decides when lists go on. Each list needs a seat, of which `concurrency` is the number. Lists that are ready share a turn of the event
 * loop, in the order in which they became ready. Lists that become ready in the same turn share one `setImmediate`.
 */
export class Turns {
  readonly #advance: (list: TaskList) => void
  readonly #turn = (): void => { this.#takeTurn() }
  // A turn serves many requests, so it must not see the `AsyncLocalStorage` stores of the one that asked for it, and would never let them
  // go.
  readonly #context = new AsyncResource('BackgroundTasksTurn')
  #seats: number
  /** Lists that wait for a seat. */
  readonly #seatless = new Queue<TaskList>()
  #ready: TaskList[] = []
  #scheduled = false
  #endsAt = 0
  #lookedAt = 0
  #granted = 1
  #credits = 1

  /** @param advance runs a list until it waits, has ended, or the turn is up */
  constructor (concurrency: number, advance: (list: TaskList) => void) {
    this.#seats = concurrency
    this.#advance = advance
  }

  /** Queues a list that has work. */
  queue (list: TaskList): void {
    list.becomeQueued()
    if (this.#seat(list)) this.#schedule(list)
    else this.#seatless.push(list)
  }

  /**
   * Queues a list as `queue` does, except that the first list of a turn of the event loop runs immediately if none waits before it. The
   * lists after it wait for the next turn, so that jobs that arrive together run together, and their verdicts leave together.
   */
  start (list: TaskList): void {
    list.becomeQueued()
    if (!this.#seat(list)) {
      this.#seatless.push(list)
    } else if (this.#scheduled) {
      this.#schedule(list)
    } else {
      this.#scheduled = true
      this.#begin()
      this.#advance(list)
      // The next turn is scheduled after the call, because the handler does not need it, and in an idle worker it takes a few µs.
      this.#callTurn()
    }
  }

  /** Frees the seat of a list that has no work left. The next list that waits for a seat takes it. */
  releaseSeat (list: TaskList): void {
    if (!list.hasSeat) return
    list.leaveSeat()
    this.#seats++
    // Lists that wait for a seat may have been abandoned meanwhile.
    let next = this.#seatless.shift()
    while (next !== undefined && next.phase !== 'queued') next = this.#seatless.shift()
    if (next !== undefined) this.queue(next)
  }

  /** Whether this turn has used up its time, so that other work has its chance. */
  turnIsOver (): boolean {
    if (--this.#credits > 0) return false
    const now = performance.now()
    const short = now - this.#lookedAt < SHORT_MS * this.#granted
    this.#granted = this.#credits = short ? SHORT_RUN : 1
    this.#lookedAt = now
    return now >= this.#endsAt
  }

  #seat (list: TaskList): boolean {
    if (list.hasSeat) return true
    if (this.#seats === 0) return false
    this.#seats--
    list.takeSeat()
    return true
  }

  #begin (): void {
    this.#lookedAt = performance.now()
    this.#endsAt = this.#lookedAt + TURN_MS
    this.#granted = this.#credits = 1
  }

  #schedule (list: TaskList): void {
    this.#ready.push(list)
    if (this.#scheduled) return
    this.#scheduled = true
    this.#callTurn()
  }

  #callTurn (): void {
    this.#context.runInAsyncScope(nextTurn, undefined, this.#turn)
  }

  #takeTurn (): void {
    const lists = this.#ready
    this.#ready = []
    this.#scheduled = false
    this.#begin()
    for (let i = 0; i < lists.length; i++) {
      if (i > 0 && this.turnIsOver()) {
        const later = this.#ready
        this.#ready = []
        for (const list of lists.slice(i).concat(later)) this.#schedule(list)
        return
      }
      // The list may have been abandoned meanwhile.
      const list = lists[i] as TaskList
      if (list.phase === 'queued') this.#advance(list)
    }
  }
}
