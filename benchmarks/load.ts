import { once } from 'node:events'
import { connect, type Socket } from 'node:net'

const REQUEST = 'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n'

/** Keep-alive connections to one server, each with one request in flight. Every reply has the length of the first one. */
export class Load {
  readonly #sockets: Socket[]

  private constructor (sockets: Socket[]) {
    this.#sockets = sockets
  }

  static async connect (port: number, connections = 10): Promise<Load> {
    const sockets = Array.from({ length: connections }, () => connect({ port, host: '127.0.0.1', noDelay: true }))
    await Promise.all(sockets.map(socket => once(socket, 'connect')))
    return new Load(sockets)
  }

  /** Resolves when so many requests have been answered. */
  async run (requests: number): Promise<void> {
    let left = requests
    await Promise.all(this.#sockets.map(async socket => {
      let replyLength = 0
      let received = 0
      const next = (): boolean => {
        if (left === 0) return false
        left--
        received = 0
        return socket.write(REQUEST, 'latin1') || true
      }
      if (!next()) return
      await new Promise<void>((resolve, reject) => {
        const onData = (chunk: Buffer): void => {
          if (replyLength === 0) replyLength = lengthOf(chunk)
          received += chunk.length
          if (received < replyLength || next()) return
          socket.off('data', onData).off('error', reject).off('close', onClose)
          resolve()
        }
        const onClose = (): void => { reject(new Error('The server closed a connection')) }
        socket.on('data', onData).on('error', reject).on('close', onClose)
      })
    }))
  }

  close (): void {
    for (const socket of this.#sockets) socket.destroy()
  }
}

function lengthOf (reply: Buffer): number {
  const text = reply.toString('latin1')
  const body = /^content-length: (\d+)\r$/im.exec(text)?.[1]
  if (!text.startsWith('HTTP/1.1 200 ') || body === undefined) throw new Error(`Not the reply to measure: ${text}`)
  return text.indexOf('\r\n\r\n') + 4 + Number(body)
}

/** Sends a request on a connection of its own, and hangs up for good as soon as the handler is seen to run. */
export async function abort (port: number): Promise<void> {
  const socket = connect({ port, host: '127.0.0.1', noDelay: true })
  socket.write(REQUEST, 'latin1')
  await once(socket, 'data')
  // A reset leaves no port in TIME_WAIT: there are not enough of them.
  socket.resetAndDestroy()
}
