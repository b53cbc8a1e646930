/** Which tasks run, where a framework answers errors itself. */
import type { ExchangeOutcome } from '../../../lib/index.js'

export const when = ({ failed, statusCode }: ExchangeOutcome) => !failed && statusCode < 400
