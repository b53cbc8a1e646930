import { asPartOf } from '../current-request.js'
import type { Jobs } from '../definitions/jobs.js'
import type { Delivery, Verdict } from '../engines/engine.js'
import { FST_BGT_CANCELLED } from '../errors.js'
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

/** Skips a task that an engine has delivered, because somebody has cancelled its job. */
export function cancelDelivery (runner: Runner, name: string, id: string): void {
  // A search costs nothing until somebody cancels, where a table of all deliveries would cost each of them.
  const found = [...runner.open].filter(list => list.isDelivery).flatMap(list => list.tasks()).filter(task => task.id === id && task.name === name)
  // The function of the task may have called this, and has to return first.
  queueMicrotask(() => { for (const task of found) if (!task.cancel()) task.cutOff(new FST_BGT_CANCELLED(name)) })
}
