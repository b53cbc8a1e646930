/** Upgraded connections. Node emits nothing when an upgrade is answered, because whoever answers writes to the bare socket. */
import type { Socket } from 'node:net'
import type { FastifyRequest } from 'fastify'

export function isUpgrade (request: FastifyRequest): boolean {
  const raw = request.raw as { upgrade?: boolean | null, headers?: { upgrade?: unknown } }
  const { upgrade } = raw
  // The stand-in for a request that `injectWS` makes has only the headers. Node builds them when they are first read.
  return upgrade === true || (upgrade === undefined && raw.headers?.upgrade !== undefined)
}

/**
 * Calls back when an upgrade is answered. The first bytes on its socket tell whether it was accepted, and a call of `end` tells whether
 * `ws` itself has refused it. Any other status that is written comes with the events of its response.
 */
export function onUpgradeAnswer (socket: Socket, answered: (status: number) => void): void {
  const { write, end } = socket
  const watch = <Method extends typeof write | typeof end>(method: Method, tells: RegExp): Method => {
    // Node's types cannot express this: the arguments and the result are those of whichever overload the caller used.
    return ((...args: unknown[]) => {
      socket.write = write
      socket.end = end
      const result: unknown = Reflect.apply(method, socket, args)
      const status = tells.exec(String(args[0]))?.[1]
      if (status !== undefined) answered(Number(status))
      return result
    }) as Method
  }
  socket.write = watch(write, /^HTTP\/1\.1 (101)/)
  socket.end = watch(end, /^HTTP\/1\.1 (\d{3})/)
}
