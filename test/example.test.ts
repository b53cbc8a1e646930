// The example as a user starts it: a process of its own, on the built package, with real HTTP, SMTP and a real browser.
import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync } from 'node:fs'
import { createServer, type AddressInfo } from 'node:net'
import { join } from 'node:path'
import { text } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'
import { SMTPServer } from 'smtp-server'
import t, { type Test } from 'tap'
import { openBrowser, withoutBrowser } from './support/browser.js'
import { freePort } from './support/servers.js'

const root = fileURLToPath(new URL('..', import.meta.url))

// Processes and browsers of a busy machine take their time to start.
t.setTimeout(120_000)

t.test('a request is answered 202, then its mail arrives and its log lines are written, the dependency\'s first', async t => {
  const example = await start(t)
  const response = await notify(example, 'ada@example.com', 'hello')
  t.equal(response.status, 202)
  t.same(await response.json(), { message: 'Notification sent in the background' })
  await example.printed(/Mail arrived\n {2}From: .*\n {2}To: ada@example\.com\n {2}Subject: Some notification\n\n {2}Hello ada@example\.com,\n {2}you asked for: hello\.\n/)
  t.equal(await example.stopped('SIGTERM'), 0)
  t.equal(example.log(), 'found query: hello\nnotification for ada@example.com\n')
})

t.test('what is no email address adds no task, no `q` none of the dependency\'s, and many lines are one in the log', async t => {
  const example = await start(t)
  const refused = await notify(example, 'eve', 'hello')
  t.equal(refused.status, 400)
  t.match(await refused.json(), { code: 'FST_ERR_VALIDATION', message: 'params/email must match format "email"' })

  await notify(example, 'ada@example.com')
  await notify(example, 'grace@example.com', 'a\r\nnotification for eve@example.com')
  t.equal(await example.stopped('SIGTERM'), 0)
  t.same(example.log().trimEnd().split('\n').sort(), [
    'found query: a notification for eve@example.com', 'notification for ada@example.com', 'notification for grace@example.com'
  ])
  t.equal(example.output().match(/Mail arrived/g)?.length, 2)
})

t.test('with SMTP_URL the mail goes there, the answer does not wait for it, and SIGTERM meanwhile loses nothing', async t => {
  const smtp = await openSmtp(t)
  const example = await start(t, { SMTP_URL: smtp.url })
  const response = await notify(example, 'ada@example.com', 'hello')
  t.equal(response.status, 202)
  const mail = await smtp.mail
  t.match(mail, /^To: ada@example\.com\r$/m)
  t.match(mail, 'you asked for: hello.')
  t.equal(example.log(), 'found query: hello\n', 'the task behind the mail waits for its turn')

  const stopped = example.stopped('SIGTERM')
  await example.printed(/"tasks":\{"sendMail":1,"writeLog":1\},"msg":"waiting for background tasks"/)
  t.equal(example.log(), 'found query: hello\n')
  smtp.take()
  t.equal(await stopped, 0)
  t.equal(example.log(), 'found query: hello\nnotification for ada@example.com\n')
  t.notMatch(example.output(), /"level":[456]0/, 'no warning and no error')
})

t.test('a mail server that cannot be reached fails the mail, and the tasks behind it run', async t => {
  const example = await start(t, { SMTP_URL: `smtp://127.0.0.1:${await freePort()}` })
  const response = await notify(example, 'ada@example.com')
  t.equal(response.status, 202)
  await example.printed(/"code":"ESOCKET".*"name":"sendMail"\},"msg":"background task failed"/)
  t.equal(await example.stopped('SIGTERM'), 0)
  t.equal(example.log(), 'notification for ada@example.com\n')
})

t.test('--demo shows a request, its answer, its mail and its log lines, and serves on', async t => {
  const example = await start(t, {}, ['--demo'])
  await example.printed(/Ctrl\+C/)
  const output = example.output()
  const order = [
    /POST http:\/\/127\.0\.0\.1:\d+\/send-notification\/ada@example\.com\?q=hello/,
    '202 {"message":"Notification sent in the background"}', 'Mail arrived', 'To: ada@example.com',
    'found query: hello', 'notification for ada@example.com', 'All background tasks done', '/docs'
  ].map(part => output.search(part))
  t.notOk(order.includes(-1), 'all of it', { output })
  t.same(order, order.toSorted((a, b) => a - b), 'in this order', { output })

  const [, address = ''] = /(http:\S+)\/docs/.exec(output) ?? []
  t.equal((await fetch(`${address}/docs/json`)).status, 200)
  t.equal(await example.stopped('SIGINT'), 0)
})

t.test('a port that is taken is said in one line, with what to do', async t => {
  const taken = createServer().listen(0, '127.0.0.1')
  await once(taken, 'listening')
  t.teardown(() => taken.close())
  const { port } = taken.address() as AddressInfo
  const example = run(t, { PORT: String(port) }, ['--demo'])
  t.equal(await example.exited, 1)
  t.equal(example.output(), `Port ${port} is taken. Choose another one, such as: PORT=3001 npm run example\n`)
})

t.test('the docs in a real browser send a notification', { skip: withoutBrowser() }, async t => {
  const example = await start(t)
  const browser = await openBrowser(t)
  const page = await browser.newPage()
  const hosts = new Set<string>()
  page.on('request', request => { if (!request.url().startsWith('data:')) hosts.add(new URL(request.url()).origin) })

  await page.goto(`${example.address}/docs`)
  await page.getByText('Notify somebody by mail').click()
  await page.getByRole('button', { name: 'Try it out' }).click()
  await page.getByPlaceholder('email').fill('grace@example.com')
  await page.getByPlaceholder('q', { exact: true }).fill('docs')
  await page.getByRole('button', { name: 'Execute' }).click()

  const answer = page.locator('.live-responses-table tbody tr').first()
  t.equal((await answer.locator('.response-col_status').innerText()).trim(), '202')
  t.match(await answer.innerText(), 'Notification sent in the background')
  await example.printed(/To: grace@example\.com\n.*\n\n.*\n {2}you asked for: docs\./)
  t.same([...hosts], [example.address], 'the page asks no other host for anything')
  t.equal(await example.stopped('SIGTERM'), 0)
  t.equal(example.log(), 'found query: docs\nnotification for grace@example.com\n')
})

interface Example {
  /** All that was printed so far. */
  output: () => string
  /** Resolves when this has been printed; rejects if the process ends first. */
  printed: (what: RegExp) => Promise<RegExpExecArray>
  /** The exit code. */
  exited: Promise<number | null>
  /** Sends the signal; the exit code. */
  stopped: (signal: NodeJS.Signals) => Promise<number | null>
  /** What is in the log file. */
  log: () => string
}

/** Runs the example on a free port, and waits until it listens. */
async function start (t: Test, env: NodeJS.ProcessEnv = {}, args: string[] = []): Promise<Example & { address: string }> {
  const example = run(t, env, args)
  const [, address = ''] = await example.printed(/(?:listening at|POST) (http:\/\/[\d.:]+)/)
  return { ...example, address }
}

function run (t: Test, env: NodeJS.ProcessEnv, args: string[]): Example {
  // In this order: tap removes the folder of `testdir` after what was registered before it was made.
  let kill = async (): Promise<void> => {}
  t.teardown(async () => { await kill() })
  const logFile = join(t.testdir({}), 'log.txt')
  // `env`, for tap gives its loaders to every process that is started here, by NODE_OPTIONS; it becomes the example.
  const command = ['-u', 'NODE_OPTIONS', process.execPath, '--import', 'tsx', 'examples/notifications/main.ts', ...args]
  const child = spawn('env', command, {
    cwd: root,
    env: { ...process.env, SMTP_URL: undefined, HOST: undefined, LOG_LEVEL: undefined, PORT: '0', LOG_FILE: logFile, ...env },
    stdio: ['ignore', 'pipe', 'pipe']
  })
  let output = ''
  let ended = false
  for (const stream of [child.stdout, child.stderr]) {
    stream.setEncoding('utf8').on('data', (chunk: string) => { output += chunk; child.emit('printed') })
  }
  const exited = once(child, 'close').then(([code]) => {
    ended = true
    child.emit('printed')
    return code as number | null
  })
  kill = async () => {
    child.kill('SIGKILL')
    await exited
  }

  return {
    output: () => output,
    exited,
    async printed (what) {
      for (;;) {
        const found = what.exec(output)
        if (found !== null) return found
        if (ended) throw new Error(`ended before it printed ${String(what)}:\n${output}`)
        await once(child, 'printed')
      }
    },
    async stopped (signal) {
      child.kill(signal)
      return await exited
    },
    log: () => existsSync(logFile) ? readFileSync(logFile, 'utf8') : ''
  }
}

async function notify ({ address }: { address: string }, email: string, q?: string): Promise<Response> {
  const query = q === undefined ? '' : `?q=${encodeURIComponent(q)}`
  return await fetch(`${address}/send-notification/${email}${query}`, { method: 'POST' })
}

/** A mail server that holds back its answer until told. */
async function openSmtp (t: Test): Promise<{ url: string, mail: Promise<string>, take: () => void }> {
  let take = (): void => {}
  let received = (_mail: string): void => {}
  const held = new Promise<void>(resolve => { take = resolve })
  const mail = new Promise<string>(resolve => { received = resolve })
  const server = new SMTPServer({
    disabledCommands: ['AUTH', 'STARTTLS'],
    disableReverseLookup: true,
    onData (stream, _session, taken) {
      text(stream).then(received).then(() => held).then(() => { taken() }, taken)
    }
  })
  const listener = server.listen(0, '127.0.0.1')
  await once(listener, 'listening')
  t.teardown(async () => { take(); await new Promise<void>(resolve => { server.close(resolve) }) })
  return { url: `smtp://127.0.0.1:${(listener.address() as AddressInfo).port}`, mail, take }
}
