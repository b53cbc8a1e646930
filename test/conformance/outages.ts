/** What an app in this process sees of a server that goes away, or falls silent. */
import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { defineTask, type TaskEngine } from '../../lib/index.js'
import { start, type Started } from '../support/app.js'
import { proxyTo, type TestServer } from '../support/servers.js'

async function until (isSo: () => boolean | Promise<boolean>): Promise<void> {
  while (!await isSo()) await sleep(20)
}

export function outages (name: string, open: (t: Test) => Promise<TestServer | undefined>, engineOf: (url: string, place: string) => TaskEngine<unknown>): void {
  t.setTimeout(240_000)
  void t.test(`outages of ${name}`, { timeout: 240_000 }, async t => {
    const server = await open(t)
    if (server === undefined) return
    t.teardown(() => server.remove())
    await server.start()
    const ran: number[] = []
    const attempts: number[] = []
    const ended: string[] = []
    const canGet = engineOf(server.url, 'any').supports.get
    const note = defineTask({ name: 'note', handler (n: number) { ran.push(n) } })
    const slow = defineTask({
      name: 'slow',
      retry: { attempts: 5, backoff: { type: 'fixed', delay: 200 } },
      async handler (ms: number, { id, attempt }) {
        attempts.push(attempt)
        await sleep(ms, undefined, { ref: false })
        ended.push(id)
      }
    })
    const open2 = async (t: Test, place: string, url = server.url): Promise<Started> => {
      const started = await start(t, { tasks: [note, slow], engine: engineOf(url, place), enqueueTimeout: 1_000, closeTimeout: 1_000 })
      await started.app.ready()
      return started
    }
    const canStore = async ({ app }: Started, n: number): Promise<boolean> =>
      await app.backgroundTasks.enqueue(note, n).then(() => true, () => false)

    await t.test('the server restarts while a job runs: its verdict is told, or it runs again', async t => {
      const started = await open2(t, 'restart')
      const { app, logs } = started
      const { id } = await app.backgroundTasks.enqueue(slow, 500)
      await until(() => attempts.length > 0)
      await server.stop()
      await t.rejects(app.backgroundTasks.enqueue(note, 0), { code: 'FST_BGT_ENGINE_UNAVAILABLE', statusCode: 503 })
      if (canGet) await t.rejects(app.backgroundTasks.get(slow, id), { code: 'FST_BGT_ENGINE_UNAVAILABLE' })
      await sleep(1_000)
      await server.start()
      await until(() => canStore(started, 1))
      await until(async () => canGet ? (await app.backgroundTasks.get(slow, id))?.state === 'succeeded' : ended.includes(id))
      await until(() => ran.includes(1))
      t.ok(logs.some(({ level, msg }) => level === 40 && msg.startsWith(`background task engine "${name}": `)), 'the outage is said')
      t.notOk(ran.includes(0))
      await app.close()
    })

    await t.test('the server falls silent: what cannot be stored is a 503 in time, and it recovers', async t => {
      const url = new URL(server.url)
      const proxy = await proxyTo(Number(url.port))
      t.teardown(() => { proxy.close() })
      url.port = String(proxy.port)
      const started = await open2(t, 'silence', url.href)
      t.ok(await canStore(started, 2))
      await until(() => ran.includes(2))
      proxy.freeze()
      const from = Date.now()
      t.notOk(await canStore(started, 3))
      t.ok(Date.now() - from < 2_500)
      await sleep(6_000)
      proxy.thaw()
      await until(() => canStore(started, 4))
      await until(() => ran.includes(4))
      proxy.freeze()
      const closing = Date.now()
      await started.app.close()
      t.ok(Date.now() - closing < 8_000, `close() resolves: ${Date.now() - closing} ms`)
    })

    await t.test('the server is gone at the close, and was never there', async t => {
      const started = await open2(t, 'gone')
      await started.app.backgroundTasks.enqueue(slow, 100_000)
      await until(() => attempts.length > 1)
      await server.kill()
      const closing = Date.now()
      await started.app.close()
      const { app } = await open2(t, 'never')
      await app.close()
      t.ok(Date.now() - closing < 15_000, `${Date.now() - closing} ms`)
    })
  })
}
