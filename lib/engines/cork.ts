import type { Writable } from 'node:stream'

/** Bytes that are worth a system call of their own, so that the server begins while more is being written. */
const CHUNK = 8192

/**
 * Gathers what is written to a connection in this turn of the event loop, so that it leaves in few system calls. One system call for each
 * command would cost more than all else that storing a job does here.
 */
export function cork (stream: Writable): void {
  // This waits for the tick and then for the end of the turn, because amqplib orders a write for the end of the turn in the tick.
  if (stream.writableCorked === 0) process.nextTick(setImmediate, () => { stream.uncork() })
  else if (stream.writableLength < CHUNK) return
  else stream.uncork()
  stream.cork()
}
