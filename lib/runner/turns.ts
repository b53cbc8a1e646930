import { AsyncResource } from 'node:async_hooks'
import { Queue } from '../queue.js'
import type { TaskList } from '../tasks/task-list.js'

/** Tests put clocks of their own in the place of timers: tasks go on all the same. */
const nextTurn = setImmediate
/** Milliseconds of one turn of the event loop that tasks may use before everything else has its chance. */
const TURN_MS = 4
/** Tasks this short are not timed one by one, but so many at a time: reading the clock costs as much as they do. */
const SHORT_MS = 0.05
const SHORT_RUN = 8

/**
 * When lists go on: each needs a seat (`concurrency`), and shares a turn of the event loop with the others that are
 * ready, the first first. Lists that become ready in the same turn share one `setImmediate`.
 */
export class Turns {
  readonly #advance: (list: TaskList) => void
  readonly #turn = (): void => { this.#takeTurn() }
  // A turn serves many requests: the stores of the one that asked for it have no place there, nor would they ever be let go.
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

  /** The list has work. */
  queue (list: TaskList): void {
    list.becomeQueued()
    if (this.#seat(list)) this.#schedule(list)
    else this.#seatless.push(list)
  }

  /**
   * As `queue`, but the first list of a turn of the event loop, with none before it, runs immediately. Those after it do not: what comes
   * together and runs together answers together.
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
      // Scheduled afterwards: the handler has no use for the turn, and that of an idle worker takes a few µs.
      this.#callTurn()
    }
  }

  /** The list has no work left: the next one that waits for a seat has it. */
  releaseSeat (list: TaskList): void {
    if (!list.hasSeat) return
    list.leaveSeat()
    this.#seats++
    // One may have been abandoned meanwhile.
    let next = this.#seatless.shift()
    while (next !== undefined && next.phase !== 'queued') next = this.#seatless.shift()
    if (next !== undefined) this.queue(next)
  }

  /** Whether other work should have its chance. */
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
      // It may have been abandoned meanwhile.
      const list = lists[i] as TaskList
      if (list.phase === 'queued') this.#advance(list)
    }
  }
}
