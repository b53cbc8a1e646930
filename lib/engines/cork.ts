import type { Writable } from 'node:stream'

/** Bytes that are worth a system call: the server is to begin while more is being written. */
const CHUNK = 8192

/**
 * What is written to this connection in this turn of the event loop leaves in few system calls. One for each command would
 * cost more than all else that storing a job does here.
 */
export function cork (stream: Writable): void {
  // Behind the tick, for amqplib writes at the end of the turn, and orders that only with the tick.
  if (stream.writableCorked === 0) process.nextTick(setImmediate, () => { stream.uncork() })
  else if (stream.writableLength < CHUNK) return
  else stream.uncork()
  stream.cork()
}
