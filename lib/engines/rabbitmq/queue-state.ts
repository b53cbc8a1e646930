/** What a queue has now, as its leader tells. */
import type { Channel, ChannelModel } from 'amqplib'
import { setTimeout as sleep } from 'node:timers/promises'
import { answered, onChannel } from './connection.js'

/** Milliseconds after which a zero is asked for again: the server says 0 if the leader of a quorum queue has not answered within 250 ms. */
const SLOW_MS = 200
/** The most times that it is asked for. On a very slow line each answer is slow. */
const MOST_ASKS = 4
/** Milliseconds in which whoever reads the failed jobs mostly has put them back. */
const RETURN_MS = 300
/** Milliseconds between two looks at whether they are back. */
const LOOK_MS = 10

export interface QueueState {
  /** Messages that nobody holds. */
  readonly messages: number
  /** Consumers. Quorum queues also count whoever holds a message, until it is acknowledged or returned. */
  readonly consumers: number
}

/** Rejects with the code 404 if there is no such queue, which closes the channel. */
export async function stateOf (channel: Channel, queue: string): Promise<QueueState> {
  for (let asks = 1; ; asks++) {
    const from = performance.now()
    const { messageCount: messages, consumerCount: consumers } = await answered(channel.checkQueue(queue))
    if (messages > 0 || consumers > 0 || performance.now() - from < SLOW_MS || asks === MOST_ASKS) return { messages, consumers }
  }
}

/** Counts the messages that nobody holds. A queue that was deleted has none. */
export async function readyIn (model: ChannelModel, queue: string): Promise<number> {
  return await orIfMissing(0, async () => await onChannel(model, async channel => (await stateOf(channel, queue)).messages))
}

/** Counts the messages of a queue that is read by nobody but `retry`, which holds what it has read for a moment. */
export async function readyWhenReturned (model: ChannelModel, queue: string): Promise<number> {
  return await orIfMissing(0, async () => await onChannel(model, async channel => (await untilReturned(channel, queue, RETURN_MS)).messages))
}

/** Resolves when nobody holds messages of a queue any more, and at the latest after so many milliseconds. */
export async function untilReturned (channel: Channel, queue: string, ms: number): Promise<QueueState> {
  const end = performance.now() + ms
  for (;;) {
    const state = await stateOf(channel, queue)
    if (state.consumers === 0 || performance.now() >= end) return state
    await sleep(LOOK_MS)
  }
}

/** Resolves to `instead` if the queue does not exist. */
export async function orIfMissing<T> (instead: T, ask: () => Promise<T>): Promise<T> {
  try {
    return await ask()
  } catch (error) {
    if ((error as { code?: unknown }).code === 404) return instead
    throw error
  }
}
