import type { Job, Json, Verdict } from '../engines/engine.js'

/**
 * What is known of a job beside its payload: its id, where it comes from, and the delivery of it if an engine has delivered it. The job's
 * record keeps this.
 */
export interface Envelope {
  readonly id: string
  readonly key: string | undefined
  readonly delayMs: number
  readonly enqueuedAt: number
  readonly headers: Record<string, string>
  readonly requestId: string | undefined
  /** What the option `context` has captured, as JSON. */
  readonly context: string | undefined
  readonly delivery?: { readonly attempt: number, readonly settle: (verdict: Verdict) => void }
}

/** A job as an engine stores it. */
export class StoredJob implements Job {
  readonly id: string
  readonly task: string
  readonly text: string
  readonly delayMs: number
  readonly keyed: boolean
  readonly enqueuedAt: number
  readonly headers: Readonly<Record<string, string>>
  readonly requestId: string | undefined
  readonly context: string | undefined

  constructor ({ id, key, enqueuedAt, headers, requestId, context }: Envelope, task: string, text: string, delayMs: number) {
    this.id = id
    this.task = task
    this.text = text
    this.delayMs = delayMs
    this.keyed = key !== undefined
    this.enqueuedAt = enqueuedAt
    this.headers = headers
    this.requestId = requestId
    this.context = context
  }

  get payload (): Json {
    return JSON.parse(this.text) as Json
  }
}
