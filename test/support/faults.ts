interface Test {
  teardown: (fn: () => unknown) => void
}

/** Who is told of what, with one listener of the process for all of them. */
const listening = { faults: new Set<unknown[]>(), warnings: new Set<unknown[]>() }
const noteFault = (fault: unknown): void => { for (const faults of listening.faults) faults.push(fault) }
const noteWarning = ({ name }: Error): void => { for (const warnings of listening.warnings) warnings.push(name) }
process.on('uncaughtExceptionMonitor', noteFault).on('unhandledRejection', noteFault).on('warning', noteWarning)

/** What would have ended the process, until the test ends: errors that nobody caught, and rejections that nobody handled. */
export function watchFaults (t: Test): unknown[] {
  return watch(t, listening.faults)
}

/** Names of the warnings of the process, until the test ends. */
export function watchWarnings (t: Test): unknown[] {
  return watch(t, listening.warnings)
}

function watch (t: Test, watchers: Set<unknown[]>): unknown[] {
  const noted: unknown[] = []
  watchers.add(noted)
  t.teardown(() => { watchers.delete(noted) })
  return noted
}
