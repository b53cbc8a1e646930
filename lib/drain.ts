import { bindingsOf } from './ledger.js'
import { attempt } from './limits.js'
import type { Runner } from './runner.js'
import type { TaskList } from './task-list.js'

/**
 * Finishes everything: resolves when nothing is left, at the latest `closeTimeout` milliseconds from now, and never rejects.
 * An aborted handler that has not settled by half of that time, with all else idle, is not waited for any longer: its tasks
 * run then.
 */
export async function drain (runner: Runner): Promise<void> {
  const { closeTimeout } = runner.options
  const startedAt = performance.now()
  if (runner.open.size > 0) sayWhatIsWaitedFor(runner)
  while (runner.open.size > 0) {
    const elapsed = performance.now() - startedAt
    if (elapsed >= closeTimeout) {
      abandon(runner)
      break
    }
    const onlyUnsettled = isOnlyUnsettled(runner.open)
    const isLate = elapsed >= closeTimeout / 2
    if (onlyUnsettled && isLate) for (const list of runner.open) list.exchange?.force()
    const until = onlyUnsettled && !isLate ? closeTimeout / 2 : closeTimeout
    await nextLeaveOr(runner, until - elapsed)
  }
  runner.closed = true
}

async function nextLeaveOr (runner: Runner, ms: number): Promise<void> {
  let timer: NodeJS.Timeout | undefined
  // The deadline alone keeps no process alive.
  const timeUp = new Promise<void>(resolve => { timer = setTimeout(resolve, ms).unref() })
  await Promise.race([runner.nextLeave(), timeUp])
  clearTimeout(timer)
}

function sayWhatIsWaitedFor (runner: Runner): void {
  const counts: Record<string, number> = {}
  for (const list of runner.open) {
    for (const { name } of list.tasks()) counts[name] = (counts[name] ?? 0) + 1
  }
  attempt(() => { runner.log.info({ tasks: counts }, 'waiting for background tasks') })
}

function isOnlyUnsettled (lists: Iterable<TaskList>): boolean {
  for (const list of lists) if (list.phase !== 'waiting') return false
  return true
}

function abandon (runner: Runner): void {
  const now = performance.now()
  const tasks = runner.abandonAll().map(({ list, task }) => ({
    ...bindingsOf(task), requestId: list.request?.id, ageMs: Math.round(now - task.addedAt)
  }))
  const names = tasks.map(task => task.name).join(', ')
  attempt(() => {
    runner.log.error({ tasks }, `background tasks abandoned, for closeTimeout has passed: ${names}`)
  })
}
