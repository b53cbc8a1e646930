/** A mail server on a loopback port, for when there is no other: what arrives there is handed on as text. */
import { once } from 'node:events'
import type { AddressInfo } from 'node:net'
import { text } from 'node:stream/consumers'
import { SMTPServer } from 'smtp-server'

export interface Inbox {
  /** `smtp://127.0.0.1:<port>` */
  url: string
  close: () => Promise<void>
}

/** @param onMail is called before the sender is told that its mail was taken */
export async function openInbox (onMail: (mail: string) => void): Promise<Inbox> {
  const server = new SMTPServer({
    disabledCommands: ['AUTH', 'STARTTLS'],
    disableReverseLookup: true,
    onData (stream, _session, taken) {
      text(stream).then(onMail).then(() => { taken() }, taken)
    }
  })
  const listener = server.listen(0, '127.0.0.1')
  await once(listener, 'listening')
  // A server on a TCP port has such an address.
  const { port } = listener.address() as AddressInfo
  return {
    url: `smtp://127.0.0.1:${port}`,
    close: async () => { await new Promise<void>(resolve => { server.close(resolve) }) }
  }
}
