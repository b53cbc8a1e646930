import { Socket } from 'node:net'

/**
 * The sockets of pg-boss's pool. Its `stop` waits for statements that a silent server will never answer. The sockets that are left then
 * are destroyed, and do not keep the process alive.
 */
export class Sockets {
  readonly #open = new Set<Socket>()
  #isClosed = false
  /** Bytes that came through sockets that are closed. */
  #receivedBefore = 0

  /** Bytes received so far. */
  get received (): number {
    let bytes = this.#receivedBefore
    for (const socket of this.#open) bytes += socket.bytesRead
    return bytes
  }

  open (): Socket {
    const socket = new Socket()
    this.#open.add(socket)
    socket.once('close', () => {
      this.#open.delete(socket)
      this.#receivedBefore += socket.bytesRead
    })
    // In the next tick pg listens to the socket.
    if (this.#isClosed) process.nextTick(() => { socket.destroy() })
    return socket
  }

  /**
   * Ends the open connections. The next statement connects anew. The sockets are destroyed without an error, because pg tells those who wait
   * by itself, and does not listen for errors of a connection that it is ending. Resolves when pg knows.
   */
  async cut (): Promise<void> {
    await Promise.all(Array.from(this.#open, socket => new Promise<void>(resolve => {
      socket.once('close', () => { setImmediate(resolve) })
      socket.destroy()
    })))
  }

  close (): void {
    this.#isClosed = true
    void this.cut()
  }
}
