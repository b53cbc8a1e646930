import { mock } from 'node:test'
import { setImmediate as turn } from 'node:timers/promises'
import type { Test } from 'tap'

export interface OwnClock {
  /** Lets so many milliseconds pass, and what is due then begin. */
  pass: (ms: number) => Promise<void>
}

/** Both clocks are the test's own until it ends, and stand still: that of `setTimeout`, and the one by which a task is due and a turn is over. */
export function ownClock (t: Pick<Test, 'teardown'>): OwnClock {
  // Whole milliseconds, so that sums are exact.
  let now = Math.ceil(performance.now())
  mock.timers.enable({ apis: ['setTimeout'] })
  Object.defineProperty(performance, 'now', { value: () => now, configurable: true, writable: true })
  t.teardown(() => {
    mock.timers.reset()
    Reflect.deleteProperty(performance, 'now')
  })
  return {
    async pass (ms) {
      await turn()
      now += ms
      mock.timers.tick(ms)
      await turn()
      await turn()
    }
  }
}
