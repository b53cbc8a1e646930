import { readFile } from 'node:fs/promises'
import type { FastifyInstance } from 'fastify'
import { printBlock } from './print.js'

const PATH = '/send-notification/ada@example.com?q=hello'

/** Sends the service one request over HTTP, and prints what comes of it. The mail is printed by the inbox that it gets to. */
export async function demonstrate (app: FastifyInstance, address: string, logFile: string): Promise<void> {
  // The first `fetch` of a process takes long, and not because of the service.
  await (await fetch(`${address}/docs/json`)).text()

  const sentAt = performance.now()
  const sinceSent = (): string => `${Math.round(performance.now() - sentAt)} ms`
  const response = await fetch(address + PATH, { method: 'POST' })
  printBlock(`\nPOST ${address}${PATH}`, [`${response.status} ${await response.text()}  after ${sinceSent()}`])

  try {
    await app.backgroundTasks.idle({ rejectOnFailure: true })
    const lines = (await readFile(logFile, 'utf8')).trimEnd().split('\n')
    printBlock(`In ${logFile}`, lines.slice(-2))
    console.log(`All background tasks done after ${sinceSent()}.\n`)
  } catch (error) {
    printBlock('A background task failed', [String(error)])
  }
  printBlock('Your turn', [
    `${address}/docs`,
    `curl -X POST '${address}/send-notification/you@example.com?q=hi'`,
    'Ctrl+C stops the service once its background tasks are done.'
  ])
}
