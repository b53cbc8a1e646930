import { subscribe, tracingChannel, unsubscribe, type TracingChannelSubscribers } from 'node:diagnostics_channel'
import type { FastifyInstance } from 'fastify'
import type { AnyTaskDefinition, TaskAddedMessage, TaskRunMessage } from 'fastify-background-tasks'
import fp from 'fastify-plugin'
import { Counter, Gauge, Histogram, register, type Registry } from 'prom-client'

export interface TaskMetricsOptions {
  /** @default prom-client's own */
  registry?: Registry
  /** Definitions whose tasks are counted at each scrape. @default none */
  definitions?: readonly AnyTaskDefinition[]
}

/** Seconds: from a log line to a report. */
const BUCKETS = [0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300]

/** Each is published once a task, when that is its state. That one has succeeded is told by its run. */
const ENDS = ['enqueued', 'failed', 'skipped', 'abandoned'].map(state => `fastify-background-tasks.${state}`)

/**
 * `GET /metrics` for Prometheus, with what has become of the background tasks. Register it behind `fastify-background-tasks`,
 * once a process: the channels are those of the process, and a registry refuses a second metric of a name.
 */
async function metrics (app: FastifyInstance, { registry = register, definitions = [] }: TaskMetricsOptions): Promise<void> {
  gaugeTasks(app, registry)
  gaugeDefinitions(app, registry, definitions)
  const stop = countTasks(registry)
  // Hooks of plugins run behind the drain: what it has cut off is counted.
  app.addHook('onClose', async () => { stop() })
  app.get('/metrics', async (_request, reply) => {
    reply.type(registry.contentType)
    return await registry.metrics()
  })
}

export const taskMetrics = fp(metrics, { name: 'task-metrics', dependencies: ['fastify-background-tasks'] })

/** What is so now, read when Prometheus asks. */
function gaugeTasks ({ backgroundTasks }: FastifyInstance, registry: Registry): void {
  const gauges: Array<[name: string, help: string, read: () => number]> = [
    ['background_tasks_pending', 'Tasks that have not started, or wait for their next attempt', () => backgroundTasks.stats.pending],
    ['background_tasks_running', 'Tasks that run', () => backgroundTasks.stats.running],
    ['background_tasks_oldest_pending_seconds', 'Age of the pending task that has waited longest', () => backgroundTasks.stats.oldestPendingMs / 1_000]
  ]
  for (const [name, help, read] of gauges) {
    const gauge: Gauge = new Gauge({ name, help, registers: [registry], collect () { gauge.set(read()) } })
  }
}

/**
 * How many tasks of each definition wait, run and have failed, in all processes together: an engine is asked when Prometheus asks. Each
 * process tells the same, so a query takes the `max` of them. A definition that the engine does not count now has no series in this scrape.
 */
function gaugeDefinitions ({ backgroundTasks, log }: FastifyInstance, registry: Registry, definitions: readonly AnyTaskDefinition[]): void {
  const gauge: Gauge = new Gauge({
    name: 'background_tasks_stored',
    help: 'Tasks of a definition in each state, of all processes',
    labelNames: ['task', 'state'],
    registers: [registry],
    async collect () {
      const counts = await Promise.allSettled(definitions.map(async definition => await backgroundTasks.count(definition)))
      gauge.reset()
      for (const [i, count] of counts.entries()) {
        const task = definitions[i]?.name ?? ''
        if (count.status === 'rejected') log.warn({ err: count.reason as Error }, `tasks of "${task}" could not be counted`)
        else for (const [state, number] of Object.entries(count.value)) gauge.set({ task, state }, number)
      }
    }
  })
}

/**
 * Counts and times by the name of the task. There are as many as the code has functions and definitions: a name given by
 * `with({ name })` must not be made of what a user has sent, or each has series of its own.
 * @returns a function that stops it
 */
function countTasks (registry: Registry): () => void {
  const registers = [registry]
  const added = new Counter({
    name: 'background_tasks_added_total', help: 'Tasks that were added here, and deliveries of an engine', labelNames: ['task'], registers
  })
  const ended = new Counter({
    name: 'background_tasks_ended_total', help: 'Tasks that have ended here, by their state; enqueued: an engine has them', labelNames: ['task', 'state'], registers
  })
  const queued = new Histogram({
    name: 'background_task_queue_duration_seconds', help: 'From addTask to the first start', labelNames: ['task'], buckets: BUCKETS, registers
  })
  const ran = new Histogram({
    name: 'background_task_run_duration_seconds', help: 'Runs, each attempt one', labelNames: ['task', 'outcome'], buckets: BUCKETS, registers
  })

  const startedAt = new WeakMap<TaskRunMessage, number>()
  const runEnded = (message: TaskRunMessage): void => {
    const { task } = message
    const outcome = 'error' in message ? 'error' : 'success'
    ran.observe({ task: task.name, outcome }, (performance.now() - (startedAt.get(message) ?? NaN)) / 1_000)
    // One that failed may be tried again: a channel tells when it is not.
    if (outcome === 'success') ended.inc({ task: task.name, state: 'succeeded' })
  }
  const runs: TracingChannelSubscribers<TaskRunMessage> = {
    start (message) {
      startedAt.set(message, performance.now())
      const { task, attempt = 1, queuedMs } = message
      if (attempt === 1) queued.observe({ task: task.name }, queuedMs / 1_000)
    },
    end (message) {
      const isAsync = !('result' in message || 'error' in message)
      if (!isAsync) runEnded(message)
    },
    asyncStart () {},
    asyncEnd: runEnded,
    error () {}
  }
  const onAdded = (message: unknown): void => {
    const { task } = message as TaskAddedMessage
    added.inc({ task: task.name })
  }
  const onEnded = (message: unknown): void => {
    const { task } = message as TaskAddedMessage
    ended.inc({ task: task.name, state: task.state })
  }

  const channel = tracingChannel<unknown, TaskRunMessage>('fastify-background-tasks.run')
  channel.subscribe(runs)
  subscribe('fastify-background-tasks.added', onAdded)
  for (const name of ENDS) subscribe(name, onEnded)
  return () => {
    channel.unsubscribe(runs)
    unsubscribe('fastify-background-tasks.added', onAdded)
    for (const name of ENDS) unsubscribe(name, onEnded)
  }
}
