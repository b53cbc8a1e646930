import type { BackgroundTask } from '../tasks/background-task.js'
import type { JobError } from '../engines/engine.js'
import { toJobError } from '../definitions/job-error.js'

/** Failures kept at most. */
const MAX_FAILURES = 100

/** Gives the error, as it was thrown if it is still there. */
type Failure = () => unknown

/**
 * What tasks threw since `idle()` returned last. An error can hold a whole response: it is held only while somebody waits. Else it is left to
 * the garbage collector, and what `idle({ rejectOnFailure: true })` rejects with then is an error of the same name and message.
 */
export class Failures {
  #failures: Failure[] = []
  #waiting = 0

  add (task: BackgroundTask, error: unknown): void {
    if (this.#failures.length < MAX_FAILURES) this.#failures.push(this.#waiting > 0 ? held(error) : remembered(task.name, error))
  }

  /** Somebody waits for failures, until the function returned is called. */
  hold (): () => void {
    this.#waiting++
    this.#failures = this.#failures.map(failure => held(failure()))
    return () => { this.#waiting-- }
  }

  take (): unknown[] {
    const failures = this.#failures
    this.#failures = []
    return failures.map(failure => failure())
  }
}

function held (error: unknown): Failure {
  return () => error
}

function remembered (task: string, error: unknown): Failure {
  if ((typeof error !== 'object' || error === null) && typeof error !== 'function') return held(error)
  return weakly(new WeakRef(error), task, toJobError(error))
}

/** A function of its own: closures of one call hold what any of them needs, the error among it. */
function weakly (ref: WeakRef<object>, task: string, { name, message, code }: JobError): Failure {
  return () => ref.deref() ?? Object.assign(new Error(`the background task "${task}" failed: ${message}`), { name, ...code !== undefined && { code } })
}
