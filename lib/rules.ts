/** The rules for options: what each one accepts, in words and as a check. */
import { FST_BGT_INVALID_OPTION, PACKAGE, show } from './errors.js'
import { isFunction } from './foreign.js'

export interface Rule {
  readonly accepts: string
  readonly test: (value: unknown) => boolean
  /** The value can hold a password, so an error message does not show it. */
  readonly isSecret?: true
}

export type Rules = Readonly<Record<string, Rule>>

const isDelay = (value: unknown): boolean => typeof value === 'number' && value >= 0 && Number.isFinite(value)

export const BOOLEAN: Rule = { accepts: 'a boolean', test: value => typeof value === 'boolean' }
export const FUNCTION: Rule = { accepts: 'a function', test: isFunction }
export const NAME: Rule = { accepts: 'a string that is not empty', test: value => typeof value === 'string' && value !== '' }
export const OBJECT: Rule = { accepts: 'an object', test: value => typeof value === 'object' && value !== null }
export const SECRET_OBJECT: Rule = { ...OBJECT, isSecret: true }
export const COUNT: Rule = { accepts: 'an integer of at least 1', test: value => Number.isInteger(value) && (value as number) >= 1 }
export const LIMIT: Rule = { accepts: 'an integer of at least 1, or Infinity', test: value => value === Infinity || COUNT.test(value) }
export const DURATION: Rule = {
  accepts: 'a finite number of milliseconds above 0',
  test: value => isDelay(value) && (value as number) > 0
}
export const DELAY: Rule = { accepts: 'a finite number of milliseconds of at least 0', test: isDelay }
export const SECONDS: Rule = {
  accepts: 'a number of seconds of at least 0',
  test: value => typeof value === 'number' && Number.isFinite(value) && value >= 0
}
/** Options whose errors begin with the name of this package. Errors of `register` appear when an app starts, among those of many plugins. */
const AT_REGISTER: ReadonlySet<string> = new Set(['register', 'worker', 'concurrency of worker', 'context', 'taskRoutes'])

/**
 * Checks options.
 * @param where whose options they are, for the message
 * @param ignored options that are meant for others
 * @throws FST_BGT_INVALID_OPTION
 */
export function check (where: string, options: unknown, rules: Rules, ignored?: ReadonlySet<string>): void {
  const begin = AT_REGISTER.has(where) ? `${PACKAGE}: ` : ''
  if (typeof options !== 'object' || options === null) {
    // Somebody may have passed a secret in place of the options.
    const isSecret = Object.values(rules).some(rule => rule.isSecret)
    throw new FST_BGT_INVALID_OPTION(`${begin}${where} accepts an object of options; received ${refused(options, isSecret)}`)
  }
  for (const [name, value] of Object.entries(options)) {
    const rule = Object.hasOwn(rules, name) ? rules[name] : undefined
    if (rule === undefined) {
      if (ignored?.has(name) === true) continue
      throw new FST_BGT_INVALID_OPTION(`${begin}${where} has no option "${name}"; it accepts ${Object.keys(rules).join(', ') || 'none'}`)
    }
    checkValue(begin, where, name, value, rule)
  }
  // An instance of a class has methods and accessors that are no properties of its own, and they are read all the same.
  for (const [name, rule] of Object.entries(rules)) {
    if (!Object.hasOwn(options, name) && !(name in Object.prototype)) checkValue(begin, where, name, (options as Record<string, unknown>)[name], rule)
  }
}

function checkValue (begin: string, where: string, name: string, value: unknown, rule: Rule): void {
  if (value === undefined || rule.test(value)) return
  throw new FST_BGT_INVALID_OPTION(`${begin}The option "${name}" of ${where} accepts ${rule.accepts}; received ${refused(value, rule.isSecret)}`)
}

function refused (value: unknown, isSecret: boolean | undefined): string {
  return isSecret === true && value !== null && value !== '' ? `a ${typeof value}, not shown here` : show(value)
}
