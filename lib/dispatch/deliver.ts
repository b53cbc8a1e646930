import type { Runner } from '../runner/runner.js'
import { TaskList } from '../tasks/task-list.js'
import type { Delivery, Verdict } from '../engines/engine.js'

/** Runs one delivery as a task of the app, and tells what has become of it. Never rejects. */
export function deliver (runner: Runner, delivery: Delivery): Promise<Verdict> {
  return new Promise(resolve => {
    const task = runner.closed ? undefined : runner.jobs.deliver(delivery, resolve)
    // Of a definition that is not known here, or of a process that is about to end: someone else's.
    if (task === undefined) resolve({ kind: 'released' })
    else new TaskList(runner, undefined, 'ended').put(task)
  })
}
