/**
 * What breaks, with servers and processes of the test's own. Counted: every job answered with 202 runs at least once, and
 * nothing runs that was answered with 503 while the server was known to be away.
 */
import { setTimeout as sleep } from 'node:timers/promises'
import t, { type Test } from 'tap'
import { proxyTo, type TestServer } from '../support/servers.js'
import { count, optionsOf, ran, startLoad, startService, until, type EngineName, type Service } from '../support/services.js'

/** @param newQueueMs milliseconds after which a new queue outlives a kill of its server */
export function faults (engine: EngineName, open: (t: Test) => Promise<TestServer | undefined>, newQueueMs = 0): void {
  t.setTimeout(240_000)
  void t.test(`faults of ${engine}`, { timeout: 240_000 }, async t => {
    const server = await open(t)
    if (server === undefined) return
    t.teardown(() => server.remove())
    let places = 0
    const newPlace = (): string => `faults_${++places}`

    const service = async (t: Test, place: string, isWorker: boolean, url = server.url): Promise<Service> =>
      await startService(t, { engine, options: optionsOf(engine, url, place), isWorker })
    const post = async ({ address }: Service, path: string): Promise<number> => (await fetch(address + path, { method: 'POST' })).status

    await t.test('absent at start: the app serves and answers 503, and recovers by itself', async t => {
      const app = await service(t, newPlace(), true)
      t.equal(await post(app, '/note/1'), 503)
      await server.start()
      let status = 0
      while (status !== 202) {
        status = await post(app, '/note/2')
        await sleep(50)
      }
      await until(() => app.started.length > 0)
      t.strictSame(app.started[0], { n: 2, attempt: 1 })
      await app.stop()
    })

    await t.test('stopped and started under load: what was accepted runs, what was refused does not', async t => {
      const place = newPlace()
      const app = await service(t, place, true)
      const clients = startLoad(() => app.address, 5)
      await until(() => clients.accepted.size > 100)
      await server.stop()
      await until(() => clients.refused.size > 20)
      const before = clients.accepted.size
      await server.start()
      await until(() => clients.accepted.size > before + 100)
      const { accepted, refused, unknown } = await clients.stop()
      await until(() => ran(app, accepted))
      t.comment(`accepted ${accepted.size}, refused ${refused.size}, of the refused ran ${count(app, refused)}`)
      t.equal(unknown.size, 0, 'the app itself always answers')
      // A call that was cut off may have been stored: "not known to be stored".
      t.ok(count(app, refused) <= 10)
      await app.stop()
    })

    await t.test('killed and started under load: what was accepted runs', async t => {
      const place = newPlace()
      const app = await service(t, place, true)
      const clients = startLoad(() => app.address, 5)
      await until(() => clients.accepted.size > 100)
      await sleep(newQueueMs)
      await server.kill()
      await until(() => clients.refused.size > 10)
      await server.start()
      const before = clients.accepted.size
      await until(() => clients.accepted.size > before + 100)
      const { accepted } = await clients.stop()
      await until(() => ran(app, accepted))
      t.pass(`${accepted.size} accepted`)
      await app.stop()
    })

    await t.test('connections cut in the middle of calls: the app goes on, and what was accepted runs', async t => {
      const { port } = new URL(server.url)
      const proxy = await proxyTo(Number(port))
      t.teardown(() => { proxy.close() })
      const url = new URL(server.url)
      url.port = String(proxy.port)
      const app = await service(t, newPlace(), true, url.href)
      const clients = startLoad(() => app.address, 5)
      for (let i = 0; i < 5; i++) {
        const before = clients.accepted.size
        await until(() => clients.accepted.size > before + 50)
        proxy.cut()
      }
      const before = clients.accepted.size
      await until(() => clients.accepted.size > before + 50)
      const { accepted, unknown } = await clients.stop()
      await until(() => ran(app, accepted))
      t.equal(unknown.size, 0)
      await app.stop()
    })

    await t.test('a worker killed with jobs running: they start again elsewhere within 15 s, as the next attempt', async t => {
      const place = newPlace()
      const web = await service(t, place, false)
      const first = await service(t, place, true)
      for (let n = 0; n < 3; n++) t.equal(await post(web, `/note/${n}?ms=600000`), 202)
      await until(() => first.started.length === 3)
      const second = await service(t, place, true)
      await first.kill()
      const killedAt = Date.now()
      await until(() => second.started.length === 3)
      const took = Date.now() - killedAt
      t.comment(`again after ${took} ms`)
      t.ok(took < 15_000, `${took} ms`)
      t.ok(second.started.every(({ attempt }) => attempt === 2))
    })

    await t.test('a job that kills its process ends failed behind its attempts, with onFailed and a line, and holds up no other', async t => {
      const place = newPlace()
      const web = await service(t, place, false)
      t.equal(await post(web, '/poison/7'), 202)
      let worker = await service(t, place, true)
      const starts: number[] = []
      const others = new Set<number>()
      let n = 100
      const look = (): void => {
        for (const start of worker.started) if (start.n >= 100) others.add(start.n)
      }
      const from = Date.now()
      while (worker.failed.length === 0) {
        if (worker.process.signalCode !== null) {
          starts.push(...worker.started.filter(start => start.n === 7).map(({ attempt }) => attempt))
          look()
          worker = await service(t, place, true)
        }
        t.equal(await post(web, `/note/${n++}`), 202)
        look()
        await sleep(100)
      }
      const took = Date.now() - from
      t.comment(`failed after ${took} ms`)
      t.strictSame(starts, [1, 2])
      t.strictSame(worker.failed, [{ n: 7, attempts: 2 }])
      await until(() => worker.lines.some(({ level, msg }) => level === 50 && msg === 'background task failed'))
      // An engine that sees a crash at once is done before a process has started thrice.
      if (took > 5_000) t.ok(others.size > 10, 'others ran meanwhile')
      await until(() => {
        look()
        return others.size === n - 100
      })
    })

    await t.test('a web process killed under load: what was accepted runs', async t => {
      const place = newPlace()
      const worker = await service(t, place, true)
      let web = await service(t, place, false)
      const clients = startLoad(() => web.address, 5)
      for (let i = 1; i <= 3; i++) {
        await until(() => clients.accepted.size > 60 * i)
        await web.kill()
        web = await service(t, place, false)
      }
      const { accepted } = await clients.stop()
      await until(() => ran(worker, accepted))
      t.pass(`${accepted.size} accepted`)
      await worker.stop()
    })
  })
}
