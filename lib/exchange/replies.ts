/** What is kept on a reply, for an exchange that may be opened later. */
import type { FastifyReply } from 'fastify'
import { isGone } from './connection.js'

const kReturned = Symbol('fastify-background-tasks.returned')
const kSending = Symbol('fastify-background-tasks.sending')
const kSettled = Symbol('fastify-background-tasks.settled')
const kFailure = Symbol('fastify-background-tasks.failure')
const kHandlingFailure = Symbol('fastify-background-tasks.handling-failure')

export interface WatchedReply extends FastifyReply {
  /** What the handler returned, or that it still runs. Absent until the handler is called. */
  [kReturned]?: unknown
  /** Whether the client was there when the reply entered the `onSend` hooks, and below, when it passed the last of them. */
  [kSending]?: Moment
  [kSettled]?: Moment
  [kFailure]?: unknown
  [kHandlingFailure]?: boolean
}

const CLIENT_THERE = 1
const CLIENT_GONE = 2
type Moment = typeof CLIENT_THERE | typeof CLIENT_GONE

const STILL_RUNS = Symbol('fastify-background-tasks.still-runs')
const NOTHING = Symbol('fastify-background-tasks.nothing')
// `undefined` can be thrown too, and must not be mistaken for no failure.
const THREW_UNDEFINED = Symbol('fastify-background-tasks.threw-undefined')

const momentOf = (reply: WatchedReply): Moment => isGone(reply.raw, reply.request) ? CLIENT_GONE : CLIENT_THERE

/** The reply has entered the `onSend` hooks. */
export function noteSending (reply: WatchedReply): void {
  reply[kSending] ??= momentOf(reply)
  if (reply[kFailure] !== undefined) reply[kHandlingFailure] = false
}

export function isSending (reply: WatchedReply): boolean {
  return reply[kSending] !== undefined
}

/** The reply has passed the last of its `onSend` hooks. */
export function noteSettled (reply: WatchedReply): void {
  reply[kSettled] ??= momentOf(reply)
}

export function isSettled (reply: WatchedReply): boolean {
  return reply[kSettled] !== undefined
}

/** Whether the client was gone before the reply was sent. */
export function isAfterAbort (reply: WatchedReply): boolean {
  return reply[kSending] === CLIENT_GONE || reply[kSettled] === CLIENT_GONE
}

/** Notes that an error was thrown or sent. The first error stays. */
export function noteFailure (reply: WatchedReply, error: unknown): void {
  reply[kFailure] ??= error === undefined ? THREW_UNDEFINED : error
  reply[kHandlingFailure] = true
}

export function hasFailed (reply: WatchedReply): boolean {
  return reply[kFailure] !== undefined
}

export function failureOf (reply: WatchedReply): unknown {
  return reply[kFailure] === THREW_UNDEFINED ? undefined : reply[kFailure]
}

export function isHandlingFailure (reply: WatchedReply): boolean {
  return reply[kHandlingFailure] === true
}

/** The handler is called. A route whose handler is watched has our last hook, too. */
export function noteHandled (reply: WatchedReply): void {
  reply[kReturned] = STILL_RUNS
}

export function isHandled (reply: WatchedReply): boolean {
  return reply[kReturned] !== undefined
}

export function noteReturned (reply: WatchedReply, value: unknown): void {
  reply[kReturned] = value === undefined ? NOTHING : value
}

/** What the handler has returned. */
export function returnedBy (reply: WatchedReply): unknown {
  const returned = reply[kReturned]
  return returned === NOTHING || returned === STILL_RUNS ? undefined : returned
}

/** Lets go what the handler has returned, so that the tasks do not hold it. */
export function letReturnedGo (reply: WatchedReply): void {
  if (reply[kReturned] !== undefined) reply[kReturned] = NOTHING
}
