/**
 * Tasks that survive kill -9, without a server: pg-boss on PGlite in a folder. Starts the service, orders three reports,
 * kills it while it makes the first ones, starts it again, and waits until all three are ready.
 */
import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'

const data = mkdtempSync(join(tmpdir(), 'reports-'))
const main = fileURLToPath(new URL('main.ts', import.meta.url))

const first = await startService()
console.log(`The service runs as process ${first.child.pid}; its jobs are in ${data}`)
const ids: string[] = []
for (const title of ['spring', 'summer', 'autumn']) {
  const reply = await fetch(`${first.address}/reports`, {
    method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify({ title, pages: 20 })
  })
  const { id } = await reply.json() as { id: string }
  console.log(`${reply.status}: "${title}" is stored as ${id}`)
  ids.push(id)
}
while (await stateOf(first.address, ids[0]) !== 'running') await sleep(50)
first.child.kill('SIGKILL')
await once(first.child, 'exit')
console.log('kill -9 while the first one was being made. Starting again …')

const second = await startService()
console.log(`The service runs as process ${second.child.pid}`)
for (const id of ids) {
  while (await stateOf(second.address, id) !== 'succeeded') await sleep(200)
  console.log(`${id}: succeeded`)
}
second.child.kill('SIGTERM')
await once(second.child, 'exit')
rmSync(data, { recursive: true, force: true })

async function startService (): Promise<{ child: ChildProcess, address: string }> {
  const child = spawn(process.execPath, [...process.execArgv, main], {
    env: { ...process.env, ENGINE: 'pglite', DATA: data, PORT: '0', LOG_LEVEL: 'error' }, stdio: ['ignore', 'pipe', 'inherit']
  })
  for await (const line of createInterface(child.stdout)) {
    const address = /^listening on (\S+)$/.exec(line)?.[1]
    if (address !== undefined) return { child, address }
  }
  throw new Error('the service did not start')
}

async function stateOf (address: string, id: string | undefined): Promise<string> {
  const reply = await fetch(`${address}/tasks/${id}`)
  return (await reply.json() as { state: string }).state
}
