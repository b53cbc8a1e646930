/**
 * An exchange is one HTTP request and its response, from the first task to its one end. The exchange has ended when it is settled (the
 * handler's side is done) and over (the socket's side is done), whichever comes last. These events tell:
 * - settled: the last `onSend` hook, whichever way the reply took there; an error in an `onSend` hook; a raw response that somebody has
 *   ended, or a hijacked reply; a handler that ends with `undefined` after an abort, when Fastify sends nothing.
 * - over: `close` of the raw response, which follows the last byte handed to the socket, an abort, a reset and a timeout. No other plugin
 *   can skip `close`. Where it does not come, other events take its place: see `#watchResponse`.
 * - failed: the `onError` hook.
 *
 * A missed event costs time and no task: an aborted exchange of which nothing more is heard ends after {@link SILENCE_MS}.
 */
import { types } from 'node:util'
import type { FastifyReply, FastifyRequest } from 'fastify'
import { isNativePromise } from '../foreign.js'
import { hasHeaders, hasNoTurnYet, isComplete, isGone, socketOf, statusOf, type RawResponse } from './connection.js'
import { watchBody } from './lost-body.js'
import type { ExchangeOutcome } from './outcome.js'
import {
  failureOf, hasFailed, isAfterAbort, isHandled, isHandlingFailure, isSending, isSettled, letReturnedGo, noteFailure, noteReturned, noteSending, returnedBy, type WatchedReply
} from './replies.js'
import { onUpgradeAnswer } from './upgrade.js'
import { joinSocket, leaveSocket } from './waiting-turn.js'
import { watchResponse, type ResponseListener } from './watched-response.js'

/** The property of a reply that holds its exchange. */
export const kExchange = Symbol('fastify-background-tasks.exchange')

/** A reply with its exchange. In a plugin registered before this one the decoration can be absent. */
export interface ExchangeReply extends WatchedReply {
  [kExchange]?: Exchange | null
}

/** Who is told of an exchange: the tasks of its request. */
export interface ExchangeListener {
  /** The exchange is there. This is called before the exchange can end. */
  exchangeOpened: (exchange: Exchange) => void
  exchangeEnded: () => void
  /** The reply will not pass `onSend`. */
  replyHijacked: () => void
  /**
   * Stores what the reply promises, before the reply goes out. Undefined if there is nothing to store.
   * @throws what is to be sent in place of the reply
   */
  storeBeforeReply: () => Promise<void> | undefined
}

/**
 * Milliseconds that an event is waited for, after an abort or the handler's own end. A callback handler may never call back, a proxy may
 * drop its answer, and a middleware may never go on.
 */
const SILENCE_MS = 10_000

/** Milliseconds between two checks for what no event tells: the raw response of a lost connection ends, or an HTTP/2 stream closes. */
const CHECK_MS = 1_000

// The timers of Node. Tests may put clocks of their own in their place, and exchanges end all the same.
const { setTimeout, clearTimeout } = globalThis

export class Exchange implements ResponseListener {
  /** Undefined until the exchange has ended. */
  outcome: ExchangeOutcome | undefined
  readonly request: FastifyRequest
  readonly listener: ExchangeListener
  /** The reply, once a hook has shown it. */
  reply: ExchangeReply | undefined
  before: ResponseListener | undefined
  /** The reply's own `hijack`, before it was wrapped. */
  hijack: FastifyReply['hijack'] | undefined
  /** Whether a failure is being handled: from `onError` until the error handler's reply enters `onSend`. */
  isHandlingFailure = false
  readonly #hasLastHook: (request: FastifyRequest, reply: WatchedReply) => boolean
  #isOver = false
  #isSettled = false
  /** Whether the reply has entered its `onSend` hooks. False while a failure of one of them is handled. */
  #isSending = false
  #hasSendFailed = false
  #isFollowingHandler = false
  #aborted = false
  /** What a hijacked upgrade was answered with. */
  #upgradeStatus: number | undefined
  #timer: NodeJS.Timeout | undefined

  /** @param hasLastHook whether the request's route has the hook that comes after all others */
  constructor (request: FastifyRequest, listener: ExchangeListener, hasLastHook: (request: FastifyRequest, reply: WatchedReply) => boolean) {
    this.request = request
    this.listener = listener
    this.#hasLastHook = hasLastHook
  }

  /** The reply is known: its raw response tells when the exchange is over. */
  attachReply (reply: ExchangeReply): void {
    if (this.reply !== undefined) return
    this.reply = reply
    reply[kExchange] = this
    this.#isSettled = isSettled(reply)
    this.#isSending = isSending(reply)
    this.isHandlingFailure = isHandlingFailure(reply)
    this.#watchResponse(reply.raw)
  }

  /**
   * The raw request is closed, and no hook of ours has shown the reply: a middleware of a plugin registered before this one has answered,
   * or the client has left.
   */
  requestClosed (): void {
    const { headers } = this.request.raw
    // The `close` of a request whose body somebody has read tells nothing about its response.
    if (this.reply !== undefined || headers['transfer-encoding'] !== undefined || Number(headers['content-length'] ?? 0) > 0) return
    const { stream } = this.request.raw as { stream?: RawResponse['stream'] }
    const isAnswered = stream === undefined ? socketOf(this.request)?.destroyed !== true : stream.rstCode === 0 && !stream.aborted
    this.#isSettled ||= isAnswered
    this.closed(isAnswered)
  }

  /** The socket's side is done. */
  closed (complete: boolean): void {
    if (this.#isOver) return
    this.#isOver = true
    this.#aborted = !complete || (this.reply !== undefined && isAfterAbort(this.reply))
    this.#stopTimer()
    leaveSocket(socketOf(this.request), this)
    this.#advance()
  }

  /** The reply has entered the `onSend` hooks. */
  sending (reply: WatchedReply): void {
    noteSending(reply)
    this.#isSending = true
    this.isHandlingFailure = false
    this.#isSettled ||= this.#hasSendFailed
    if (this.#isOver) this.#advance()
  }

  /** The handler's side is done. */
  settle (): void {
    this.#isSettled = true
    this.#advance()
  }

  /** An error was thrown or sent. */
  fail (reply: WatchedReply, error: unknown): void {
    const isFirst = !hasFailed(reply)
    noteFailure(reply, error)
    this.isHandlingFailure = true
    const wasSending = this.#isSending
    this.#isSending = false
    // An `onSend` hook has failed, or the payload. The error's own reply may fail there too, and reach no last hook or no hook at all.
    if (!wasSending) return
    this.#hasSendFailed = true
    if (!isFirst) this.settle()
  }

  /** The handler has returned. */
  returned (reply: WatchedReply, value: unknown): void {
    noteReturned(reply, value)
    this.#advance()
  }

  /** The reply was hijacked: Fastify will not send it. */
  hijacked (): void {
    this.#isSettled = true
    this.listener.replyHijacked()
    this.#advance()
  }

  /** Watches the bare socket of an upgrade for its answer. */
  watchUpgrade (): void {
    const socket = this.reply?.raw.socket ?? socketOf(this.request)
    if (socket == null) return
    onUpgradeAnswer(socket, status => {
      this.#upgradeStatus = status
      this.#isSettled ||= status === 101
      this.closed(true)
    })
  }

  /** Ends an exchange that was never seen to settle, or to be over. */
  force (): void {
    this.#aborted ||= !this.#isOver
    this.#isOver = true
    this.#isSettled = true
    this.#advance()
  }

  /** What the outcome would be, if the exchange ended now. */
  currentOutcome (): ExchangeOutcome {
    const { reply } = this
    const statusCode = this.#upgradeStatus ?? (reply === undefined ? 200 : statusOf(reply.raw))
    const aborted = this.#aborted
    if (reply === undefined || !hasFailed(reply)) return { statusCode, failed: false, aborted }
    return { statusCode, failed: true, error: failureOf(reply), aborted }
  }

  /** The promise that the handler has returned, if it is a native one. */
  get handling (): Promise<unknown> | undefined {
    const returned = this.reply === undefined ? undefined : returnedBy(this.reply)
    return isNativePromise(returned) ? returned : undefined
  }

  #advance (): void {
    if (!this.#isOver || this.outcome !== undefined) return
    if (this.#hasSettled) this.#end()
    else this.#awaitHandler()
  }

  get #hasSettled (): boolean {
    return this.#isSettled || this.reply?.sent === true || this.#isAnsweredByHand || this.#hasPassedOnSend
  }

  /** Whether somebody has written to the raw response, as an SSE handler or a middleware does, and no promise tells when they are done. */
  get #isAnsweredByHand (): boolean {
    const { reply } = this
    return reply !== undefined && !this.#isAnswering && returnedBy(reply) === undefined && hasHeaders(reply.raw)
  }

  /** Whether Fastify has the answer, or an error handler makes it. `onSend` tells when that has settled. */
  get #isAnswering (): boolean {
    return this.#isSending || this.isHandlingFailure
  }

  /** Whether the reply has passed the hooks that we see, on a route without our last hook (see `hasLastHook` in watch.ts). */
  get #hasPassedOnSend (): boolean {
    return this.#isSending && this.reply !== undefined && !this.#hasLastHook(this.request, this.reply)
  }

  #stopTimer (): void {
    clearTimeout(this.#timer)
    this.#timer = undefined
  }

  #end (): void {
    this.#stopTimer()
    this.outcome = this.currentOutcome()
    // The tasks must not hold what the handler has returned.
    if (this.reply !== undefined) letReturnedGo(this.reply)
    this.listener.exchangeEnded()
  }

  /** The response is over, and the handler has given no sign yet. */
  #awaitHandler (): void {
    if (this.#isFollowingHandler) return
    const { reply } = this
    // A returned reply waits for the response, which is over.
    if (reply !== undefined && returnedBy(reply) === reply && !this.#isAnswering) {
      this.settle()
      return
    }
    const { handling } = this
    if (handling === undefined || !types.isPromise(handling)) {
      this.#startSilence()
      if (reply === undefined || !isHandled(reply)) watchBody(this)
      return
    }
    this.#isFollowingHandler = true
    const ended = (): void => {
      this.#isFollowingHandler = false
      this.#startSilence()
    }
    handling.then(value => {
      if ((value === undefined || value === reply) && !this.#isAnswering) this.settle()
      // Any other value reaches `onSend`, unless somebody swallows it. A rejection does, too.
      else ended()
    }, ended)
    this.#stopTimer()
  }

  /** Starts to wait for a limited time. There may be no further event, but a raw response that somebody ends is seen. */
  #startSilence (leftMs = SILENCE_MS): void {
    if (this.outcome !== undefined) return
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined
      const left = leftMs - CHECK_MS
      if (left <= 0 || this.#hasSettled) this.settle()
      else this.#startSilence(left)
    }, CHECK_MS).unref()
  }

  /** A body that will never come keeps Fastify from calling the handler. */
  bodyLost (): void {
    if (this.reply === undefined || (!isHandled(this.reply) && !this.#isAnswering)) this.settle()
  }

  #watchResponse (raw: RawResponse): void {
    if (isGone(raw, this.request)) {
      this.closed(isComplete(raw, this.request))
      return
    }
    watchResponse(raw, this)
    if (hasNoTurnYet(raw)) joinSocket(socketOf(this.request), this)
    if (raw.stream !== undefined) this.#checkStream(raw, raw.stream)
  }

  #checkStream (raw: RawResponse, stream: NonNullable<RawResponse['stream']>): void {
    this.#timer = setTimeout(() => {
      if (stream.closed) this.closed(isComplete(raw, this.request))
      else this.#checkStream(raw, stream)
    }, CHECK_MS).unref()
  }
}
