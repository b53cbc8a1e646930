/**
 * What happens to tasks, published on `node:diagnostics_channel`. Nothing is allocated for a channel nobody subscribed to.
 *
 * `tracingChannel('fastify-background-tasks.run')` traces each run of a task ({@link TaskRunMessage}): `start` and `end`
 * around the synchronous part, `asyncStart` and `asyncEnd` when a promise has settled, `error` before the end of a
 * failed one. A run that is over at its `end` has a `result` or an `error` there. `channel.start.bindStore(als, …)` gives the task a store of its own, say a span.
 */
import { channel, tracingChannel, type Channel } from 'node:diagnostics_channel'
import type { FastifyRequest } from 'fastify'
import type { BackgroundTask } from './background-task.js'
import { attempt, isNativePromise } from '../foreign.js'

/**
 * Message of `tracingChannel('fastify-background-tasks.run')`: one object for each run of a task, published on `start` and `end`
 * around the synchronous part, on `asyncStart` and `asyncEnd` when a promise has settled, and on `error` before the end of a
 * failed run.
 */
export interface TaskRunMessage {
  /** The task that runs. */
  task: BackgroundTask
  /** The request whose list the task is on; none for a task of the app. */
  request?: FastifyRequest
  /** Milliseconds between `addTask` and the start; of what an engine has delivered, since then. */
  queuedMs: number
  /** Of a task of a definition: which of its starts this is, from 1. */
  attempt?: number
  /** Of a task of a definition: what has travelled with it, trace context for one. */
  headers?: Readonly<Record<string, string>>
  /** Set once the task has succeeded: what it returned, or resolved to. */
  result?: unknown
  /** Set once the task has failed. */
  error?: unknown
}

/** Message of `channel('fastify-background-tasks.added')`: a task was added. */
export interface TaskAddedMessage {
  /** The task that it is about. */
  task: BackgroundTask
  /** The request whose list the task is on; none for a task of the app. */
  request?: FastifyRequest
}

/** Message of `channel('fastify-background-tasks.skipped')`: a task does not run. */
export interface TaskSkippedMessage extends TaskAddedMessage {
  /** Why the task does not run, in words. */
  reason: string
}

/** Message of `channel('fastify-background-tasks.failed')`: a task has failed, and no attempt is left, or there was none. */
export interface TaskFailedMessage extends TaskAddedMessage {
  /** What was thrown. */
  error: unknown
}

/** Message of `channel('fastify-background-tasks.abandoned')`: a task was cut off by the deadline of the drain, or added after it. */
export interface TaskAbandonedMessage extends TaskAddedMessage {
  /** Milliseconds since `addTask`. */
  ageMs: number
}

/** Message of `channel('fastify-background-tasks.enqueue')`: a task of a definition was added. */
export interface TaskEnqueueMessage {
  /** The task, which has its id. */
  task: BackgroundTask
  /** Travel with the task: a subscriber may change them. */
  headers: Record<string, string>
}

export const runChannel = tracingChannel<unknown, TaskRunMessage>('fastify-background-tasks.run')
export const addedChannel = channel('fastify-background-tasks.added')
export const enqueueChannel = channel('fastify-background-tasks.enqueue')
/** Message: {@link TaskAddedMessage}. An engine has stored the task. */
export const enqueuedChannel = channel('fastify-background-tasks.enqueued')
export const failedChannel = channel('fastify-background-tasks.failed')
export const skippedChannel = channel('fastify-background-tasks.skipped')
export const abandonedChannel = channel('fastify-background-tasks.abandoned')

/** Node catches what a subscriber throws; what has replaced `publish` may throw all the same, and is no concern of the task. */
export function publish (channel: Channel, message: object): void {
  attempt(() => { channel.publish(message) })
}

/** `TracingChannel#hasSubscribers` came with Node 20.13; the five channels have always had theirs. */
export function runIsTraced (): boolean {
  return runChannel.start.hasSubscribers || runChannel.end.hasSubscribers || runChannel.error.hasSubscribers ||
    runChannel.asyncStart.hasSubscribers || runChannel.asyncEnd.hasSubscribers
}

/** Calls a task's function between `start` and `end`; a promise that it returns goes on to {@link publishRunEnd}. */
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

/** The promise of a task has settled. */
export function publishRunEnd (message: TaskRunMessage): void {
  if ('error' in message) publish(runChannel.error, message)
  publish(runChannel.asyncStart, message)
  publish(runChannel.asyncEnd, message)
}
