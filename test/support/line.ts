/** A line between an app and servers: what a name, a network and a load balancer are elsewhere. */
import { once } from 'node:events'
import { connect, createServer, type AddressInfo, type Socket } from 'node:net'

export interface Line {
  readonly port: number
  /** New connections go to this port. Those that exist stay. */
  to: (port: number) => void
  /** Cuts every connection, and each new one. */
  refuse: () => void
  accept: () => void
  close: () => void
}

/** @param delayMs milliseconds in each direction */
export async function lineTo (first: number, delayMs = 0): Promise<Line> {
  const sockets = new Set<Socket>()
  let [target, isOpen] = [first, true]
  const cut = (): void => { for (const socket of sockets) socket.destroy() }
  const server = createServer(client => {
    if (!isOpen) {
      client.destroy()
      return
    }
    const upstream = connect(target, '127.0.0.1')
    for (const [from, to] of [[client, upstream], [upstream, client]] as const) {
      sockets.add(from)
      from.on('error', () => {})
      from.on('close', () => {
        sockets.delete(from)
        to.destroy()
      })
      from.on('data', chunk => {
        if (delayMs === 0) to.write(chunk)
        else setTimeout(() => { to.write(chunk) }, delayMs)
      })
    }
  }).listen(0, '127.0.0.1')
  await once(server, 'listening')
  return {
    port: (server.address() as AddressInfo).port,
    to (port) { target = port },
    refuse () {
      isOpen = false
      cut()
    },
    accept () { isOpen = true },
    close () {
      server.close()
      cut()
    }
  }
}
