import type { Writable } from 'node:stream'

/** Bytes that are worth a system call: the server is to begin while more is being written. */
const CHUNK = 8192

/**
 * What is written to this connection until the end of this turn of the event loop leaves in few system calls. One for each
 * command would cost more than all else that storing a job does here.
 */
export function cork (stream: Writable): void {
  if (stream.writableCorked === 0) setImmediate(() => { stream.uncork() })
  else if (stream.writableLength < CHUNK) return
  else stream.uncork()
  stream.cork()
}
