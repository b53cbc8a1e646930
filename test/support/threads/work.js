/** What a task does in a thread: `payload.do` says what. */
import { threadId } from 'node:worker_threads'

export default async function work ({ do: what, ms = 0 }, context) {
  if (what === 'block') {
    const end = Date.now() + ms
    while (Date.now() < end);
  }
  if (what === 'throw') throw Object.assign(new RangeError('no'), { code: 'E_NO' })
  if (what === 'throw when told') new BroadcastChannel(what).onmessage = () => { throw new Error('late') }
  if (what === 'not JSON') return { big: 1n }
  if (what === 'undefined') return undefined
  return { threadId, context }
}
