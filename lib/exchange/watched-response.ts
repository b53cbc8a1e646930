/** The events of a raw response, told to its exchanges. */
import { endsAtFinish, isComplete, type RawResponse as Raw } from './connection.js'
import type { Exchange } from './exchange.js'
import { kExchange } from './replies.js'
import { isUpgrade } from './upgrade.js'

type RawResponse = Raw & { [kExchange]?: Exchange }

export function watchResponse (raw: RawResponse, exchange: Exchange): void {
  exchange.before = raw[kExchange]
  raw[kExchange] = exchange
  if (exchange.before !== undefined) return
  raw.on('close', onClose)
  // A client that closes its HTTP/2 stream with NO_ERROR: `close` may never come.
  raw.stream?.on('aborted', () => { onClose.call(raw) })
  // Nobody detaches a refused upgrade's response from its socket, so its `close` waits for the connection's.
  if (endsAtFinish(raw) || isUpgrade(exchange.request)) raw.on('finish', onFinish)
}

/** Shared, because a closure for each response costs 9 % of an empty request. */
function onClose (this: RawResponse): void {
  for (let exchange = this[kExchange]; exchange !== undefined; exchange = exchange.before) {
    exchange.closed(isComplete(this, exchange.request))
  }
}

function onFinish (this: RawResponse): void {
  for (let exchange = this[kExchange]; exchange !== undefined; exchange = exchange.before) exchange.closed(true)
}
