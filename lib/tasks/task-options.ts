/** Options of one task, and the condition under which it runs. */
import { FST_BGT_INVALID_OPTION } from '../errors.js'
import type { ExchangeOutcome } from '../exchange/outcome.js'
import { isFunction } from '../foreign.js'
import { check, DURATION, NAME, type Rule, type Rules } from '../rules.js'

/**
 * Which tasks of a request run, decided when its response has ended:
 * - `'success'`: unless the request failed, that is, an error was thrown or sent on the way. A status set by hand is no
 *   failure, nor is a client that disconnects. This is FastAPI's rule.
 * - `'error'`: only if it failed.
 * - `'always'`.
 * - a function of the outcome. When it throws, the task is `failed` with that error. It is asked synchronously: a promise fails the task, too.
 */
export type TaskCondition = 'success' | 'error' | 'always' | ((outcome: ExchangeOutcome) => boolean)

/** Options of `with()`: for the tasks added through it only. */
export interface TaskOptions {
  /** Which outcomes the task runs for; not for tasks of the app, which have no exchange. @default the definition's, else the plugin's */
  readonly when?: TaskCondition | undefined
  /** Milliseconds for the task, or for one attempt of a definition's. @default the definition's, else the plugin's */
  readonly timeout?: number | undefined
  /** The task's name in log lines and messages, in place of the function's; not for a definition, which has one. @default the function's */
  readonly name?: string | undefined
}

/** @internal What `with()` said, and what was so when the task was added. */
export interface AddedOptions extends TaskOptions {
  /** A failure was being handled: the default `when` does not skip the task. */
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
 * The options of `with()`, checked and copied: what becomes of the caller's object later changes nothing.
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
