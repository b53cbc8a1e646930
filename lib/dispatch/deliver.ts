import { asPartOf } from '../current-request.js'
import type { Jobs } from '../definitions/jobs.js'
import type { Delivery, Verdict } from '../engines/engine.js'
import type { Runner } from '../runner/runner.js'
import { TaskList } from '../tasks/task-list.js'

/** Runs one delivery as a task of the app. Resolves to what has become of it, and never rejects. */
export function deliver (runner: Runner, jobs: Jobs, delivery: Delivery): Promise<Verdict> {
  return new Promise(resolve => {
    // An engine may deliver from code that a request has started.
    const task = runner.isClosed ? undefined : asPartOf(undefined, () => jobs.deliver(delivery, resolve))
    if (task === undefined) {
      // The definition is not known here, or the process is about to end, so another process takes the job.
      resolve({ kind: 'released' })
      return
    }
    const list = new TaskList(runner, undefined)
    task.attachTo(list, undefined)
    list.pushOnly(task)
    runner.taskDelivered(list, task)
  })
}
