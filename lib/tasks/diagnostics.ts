/**
 * What happens to tasks, published on `node:diagnostics_channel`. Nothing is allocated for a channel without subscribers.
 *
 * `tracingChannel('fastify-background-tasks.run')` traces each run of a task ({@link TaskRunMessage}), which is one attempt of a task of a
 * definition: `start` and `end` around the synchronous part, `asyncStart` and `asyncEnd` when a promise has settled, `error` before the end
 * of a failed run. A run that is over at its `end` has a `result` or an `error` there. `channel.start.bindStore(als, …)` gives the task a
 * store of its own, for example a span.
 */
import { channel, tracingChannel, type Channel } from 'node:diagnostics_channel'
import type { FastifyRequest } from 'fastify'
import type { BackgroundTask } from './background-task.js'
import { attempt, isNativePromise } from '../foreign.js'

/**
 * Message of `tracingChannel('fastify-background-tasks.run')`: one object for each run of a task, which is one attempt of a task of a
 * definition. The message is published on `start` and `end` around the synchronous part, on `asyncStart` and `asyncEnd` when a promise has
 * settled, and on `error` before the end of a failed run.
 */
export interface TaskRunMessage {
  /** The task that runs. */
  task: BackgroundTask
  /** The request whose list the task is on; none for a task of the app. */
  request?: FastifyRequest
  /** Milliseconds between `addTask` and this run. For a job that an engine has delivered, milliseconds since the delivery. */
  queuedMs: number
  /** The number of this attempt, from 1. Only a task of a definition has one. */
  attempt?: number
  /** The headers that have travelled with the task, for example trace context. Only a task of a definition has them. */
  headers?: Readonly<Record<string, string>>
  /** What the task returned, or resolved to. Set when the task has succeeded. */
  result?: unknown
  /** What the task threw, or rejected with. Set when the task has failed. */
  error?: unknown
}

/** Message of `channel('fastify-background-tasks.added')`: a task was added. */
export interface TaskAddedMessage {
  /** The task that the message is about. */
  task: BackgroundTask
  /** The request whose list the task is on; none for a task of the app. */
  request?: FastifyRequest
}

/** Message of `channel('fastify-background-tasks.skipped')`: a task does not run. */
export interface TaskSkippedMessage extends TaskAddedMessage {
  /** Why the task does not run, in words. */
  reason: string
}

/** Message of `channel('fastify-background-tasks.failed')`: a task has failed for good, with or without an attempt. */
export interface TaskFailedMessage extends TaskAddedMessage {
  /** What was thrown. */
  error: unknown
}

/** Message of `channel('fastify-background-tasks.abandoned')`: a task was cut off by the deadline of a shutdown, or was added after it. */
export interface TaskAbandonedMessage extends TaskAddedMessage {
  /** Milliseconds since `addTask`. */
  ageMs: number
}

/** Message of `channel('fastify-background-tasks.enqueue')`: a task of a definition was added. */
export interface TaskEnqueueMessage {
  /** The task, which has its id. */
  task: BackgroundTask
  /** The headers that travel with the task. A subscriber may change them. */
  headers: Record<string, string>
}

export const runChannel = tracingChannel<unknown, TaskRunMessage>('fastify-background-tasks.run')
export const addedChannel = channel('fastify-background-tasks.added')
export const enqueueChannel = channel('fastify-background-tasks.enqueue')
/** The channel for a task that an engine has stored. Message: {@link TaskAddedMessage}. */
export const enqueuedChannel = channel('fastify-background-tasks.enqueued')
export const failedChannel = channel('fastify-background-tasks.failed')
export const skippedChannel = channel('fastify-background-tasks.skipped')
export const abandonedChannel = channel('fastify-background-tasks.abandoned')

/**
 * Publishes a message. Node catches what a subscriber throws. A `publish` that somebody has replaced may throw all the same, and must not
 * disturb the task.
 */
export function publish (channel: Channel, message: object): void {
  attempt(() => { channel.publish(message) })
}

/** Whether somebody traces runs. `TracingChannel#hasSubscribers` came with Node 20.13, but its five channels have always had theirs. */
export function runIsTraced (): boolean {
  return runChannel.start.hasSubscribers || runChannel.end.hasSubscribers || runChannel.error.hasSubscribers ||
    runChannel.asyncStart.hasSubscribers || runChannel.asyncEnd.hasSubscribers
}

/**
 * Calls a task's function between `start` and `end`. If the function returns a promise, {@link publishRunEnd} follows when the promise has
 * settled.
 */
export function traceRun (message: TaskRunMessage, call: () => unknown): unknown {
  return runChannel.start.runStores(message, () => {
    let result: unknown
    try {
      result = call()
      if (!isNativePromise(result)) message.result = result
    } catch (error) {
      message.error = error
      publish(runChannel.error, message)
      publish(runChannel.end, message)
      throw error
    }
    publish(runChannel.end, message)
    return result
  })
}

/** Publishes that the promise of a task has settled. */
export function publishRunEnd (message: TaskRunMessage): void {
  if ('error' in message) publish(runChannel.error, message)
  publish(runChannel.asyncStart, message)
  publish(runChannel.asyncEnd, message)
}
