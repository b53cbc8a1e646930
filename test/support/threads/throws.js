/** What a task throws: `payload.do` says what. */
import { runInNewContext } from 'node:vm'

/** What is the same for a handler and for a file. */
export const THROWN = {
  'code 404': () => Object.assign(new Error('not found'), { code: 404 }),
  'code E_NO': () => Object.assign(new RangeError('no'), { code: 'E_NO' }),
  'code of another kind': () => Object.assign(new Error('no'), { code: undefined }),
  'an error of another realm': () => runInNewContext('Object.assign(new TypeError("of a vm"), { code: 7 })'),
  'an abort': () => AbortSignal.abort().reason,
  text: () => 'text',
  number: () => 0,
  null: () => null,
  undefined: () => undefined,
  bigint: () => 1n,
  object: () => ({ code: 404, date: new Date(0) })
}

const NOT_CLONED = {
  symbol: () => Symbol('thrown'),
  function: () => () => {},
  proxy: () => new Proxy({}, { getPrototypeOf () { throw new Error('trap') } })
}

/** @param {{ do?: string }} payload */
export default function throws ({ do: what = '' }) {
  throw ({ ...THROWN, ...NOT_CLONED })[what]()
}
