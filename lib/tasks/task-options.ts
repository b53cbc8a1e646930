/** Options of one task, and the condition under which it runs. */
import { FST_BGT_INVALID_OPTION } from '../errors.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import { isFunction } from '../foreign.js'
import { check, DURATION, NAME, type Rule, type Rules } from '../rules.js'

/**
 * Which tasks of a request run, decided when its response has ended:
 * - `'success'`: unless the request failed, which means that an error was thrown or sent while it was handled. A status that is set by hand
 *   is no failure, and neither is a client that disconnects. This is FastAPI's rule.
 * - `'error'`: only if the request failed.
 * - `'always'`: in any case.
 * - a function of the outcome. If it throws, the task is `failed` with that error. The answer has to be synchronous: a promise fails the
 *   task, too.
 */
export type TaskCondition = 'success' | 'error' | 'always' | ((outcome: ExchangeOutcome) => boolean)

/** Options of `with()`. They are for the tasks that are added through what `with()` returns, and for no others. */
export interface TaskOptions {
  /**
   * The outcomes of a request for which the task runs. Tasks of the app have no outcome, and refuse this option. @default the definition's,
   * else the plugin's
   */
  readonly when?: TaskCondition | undefined
  /** Milliseconds for the task. For a task of a definition, milliseconds for one attempt. @default the definition's, else the plugin's */
  readonly timeout?: number | undefined
  /**
   * The task's name in log lines and messages, instead of the function's. A definition has a name, and refuses this option. @default the
   * function's
   */
  readonly name?: string | undefined
}

/** The options of `with()`, and whether a failure was being handled when the task was added. */
export interface AddedOptions extends TaskOptions {
  /** Whether a failure was being handled. Then the default `when` does not skip the task. */
  readonly isForFailure?: boolean
}

export const CONDITION: Rule = {
  accepts: '\'success\', \'error\', \'always\' or a function of the outcome',
  test: value => value === 'success' || value === 'error' || value === 'always' || isFunction(value)
}

const APP_TASK_RULES: Rules = {
  timeout: DURATION,
  name: NAME
}

const REQUEST_TASK_RULES: Rules = { ...APP_TASK_RULES, when: CONDITION }

/**
 * Checks and copies the options of `with()`, so that later changes of the caller's object change nothing.
 * @throws FST_BGT_INVALID_OPTION
 */
export function checkTaskOptions (options: TaskOptions, ofApp: boolean): TaskOptions {
  if (ofApp && options?.when !== undefined) {
    throw new FST_BGT_INVALID_OPTION('The option "when" of with is for tasks of a request: those of the app have no exchange that could decide')
  }
  const own = typeof options === 'object' && options !== null ? { ...options } : options
  check('with', own, ofApp ? APP_TASK_RULES : REQUEST_TASK_RULES)
  return own
}
