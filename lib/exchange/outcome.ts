/** How an exchange ended: one HTTP request and its response. */
export interface ExchangeOutcome {
  /** The status code of the response, whether it was sent or not. 101 for an upgrade. */
  readonly statusCode: number
  /** Whether an error was thrown or sent while the request was handled, even if an error handler then answered 200. */
  readonly failed: boolean
  /** The error of a failed exchange. This is `undefined` if `undefined` was thrown. */
  readonly error?: unknown
  /** Whether the connection or stream was gone before the response was complete. */
  readonly aborted: boolean
}
