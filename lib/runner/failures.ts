import type { BackgroundTask } from '../tasks/background-task.js'
import type { JobError } from '../engines/engine.js'
import { toJobError } from '../definitions/job-error.js'

/** The most failures that are kept. */
const MAX_FAILURES = 100

/** Returns the error as it was thrown, or a new one if that was garbage-collected. */
type Failure = () => unknown

/**
 * What tasks threw since `idle()` returned last. An error can hold a whole response, so errors are held only while somebody waits.
 * Otherwise the garbage collector may take an error. Then `idle({ rejectOnFailure: true })` rejects with a new error of the same name and
 * code, which quotes the message.
 */
export class Failures {
  #failures: Failure[] = []
  #waiting = 0

  add (task: BackgroundTask, error: unknown): void {
    if (this.#failures.length < MAX_FAILURES) this.#failures.push(this.#waiting > 0 ? held(error) : remembered(task.name, error))
  }

  /** Holds the failures themselves, because somebody waits for them, until the function that this returns is called. */
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

/** A function apart, because all closures of one call hold whatever one of them needs, which would be the error. */
function weakly (ref: WeakRef<object>, task: string, { name, message, code }: JobError): Failure {
  return () => ref.deref() ?? Object.assign(new Error(`the background task "${task}" failed: ${message}`), { name, ...code !== undefined && { code } })
}
