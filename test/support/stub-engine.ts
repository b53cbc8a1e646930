import type { Delivery, EngineEvents, Job, JobRecord, Receipt, TaskEngine, TaskSpec, Verdict } from '../../lib/index.js'

/** An engine in memory that does as it is told: what the core makes of engines, without one. */
export class StubEngine implements TaskEngine<unknown> {
  readonly name = 'stub'
  readonly supports = { delay: true, key: true, tx: true, get: true, count: false, find: false, retry: false, cancel: false }
  groups = false
  readonly calls: string[] = []
  specs: readonly TaskSpec[] = []
  /** Each call of `enqueue`. */
  readonly stored: Array<readonly Job[]> = []
  readonly transactions: unknown[] = []
  run: ((delivery: Delivery) => Promise<Verdict>) | undefined
  /** What its methods wait for, or fail with. */
  onStart = async (): Promise<void> => {}
  onEnqueue = async (_jobs: readonly Job[]): Promise<void> => {}
  onConsume = async (): Promise<void> => {}
  onStop = async (): Promise<void> => {}
  report: ((error: Error) => void) | undefined

  cancelled: ((task: string, id: string) => void) | undefined

  async start (tasks: readonly TaskSpec[], { error, cancelled }: EngineEvents): Promise<void> {
    this.calls.push('start')
    this.specs = tasks
    this.report = error
    this.cancelled = cancelled
    await this.onStart()
  }

  async enqueue (jobs: readonly Job[], options?: { tx?: unknown }): Promise<Receipt[]> {
    this.calls.push('enqueue')
    this.transactions.push(options?.tx)
    await this.onEnqueue(jobs)
    const known = new Set(this.stored.flat().map(({ id }) => id))
    // As an engine would: what is parsed at each read is parsed once.
    this.stored.push(jobs.map(job => ({ ...job, payload: job.payload })))
    return jobs.map(({ id }) => ({ id, duplicate: known.has(id) }))
  }

  async consume (run: (delivery: Delivery) => Promise<Verdict>): Promise<void> {
    this.calls.push('consume')
    await this.onConsume()
    this.run = run
  }

  async pause (): Promise<void> {
    this.calls.push('pause')
  }

  async get (task: string, id: string): Promise<JobRecord | undefined> {
    this.calls.push('get')
    const job = this.stored.flat().find(job => job.id === id && job.task === task)
    return job === undefined ? undefined : { id, name: task, state: 'pending', attempt: 0, enqueuedAt: new Date(job.enqueuedAt).toISOString() }
  }

  async stop (): Promise<void> {
    this.calls.push('stop')
    await this.onStop()
  }

  /** Delivers a job that was stored, or one written by hand. */
  async deliver (delivery: Partial<Delivery> & { task: string }): Promise<Verdict> {
    if (this.run === undefined) throw new Error('nobody consumes')
    return await this.run({ id: 'by-hand', payload: null, attempt: 1, enqueuedAt: Date.now(), headers: {}, requestId: undefined, ...delivery })
  }
}
