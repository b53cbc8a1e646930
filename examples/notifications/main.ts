/**
 * Starts the service. With `--demo` it sends itself a request first.
 *
 * PORT (3000), HOST (127.0.0.1), LOG_FILE (a new temporary file), LOG_LEVEL, and SMTP_URL: without it mail goes to an inbox
 * in this process, which prints it.
 */
import closeWithGrace from 'close-with-grace'
import { buildApp } from './app.js'
import { demonstrate } from './demo.js'
import { openInbox } from './inbox.js'
import { temporaryLogFile } from './log-file.js'
import { smtpMailer, type Mailer } from './mail.js'
import { printMail } from './print.js'

const demo = process.argv.includes('--demo')
const {
  PORT = '3000',
  HOST = '127.0.0.1',
  LOG_FILE = temporaryLogFile(),
  LOG_LEVEL = demo ? 'warn' : 'info',
  SMTP_URL
} = process.env

const mailer = SMTP_URL === undefined ? await mailerToInbox() : smtpMailer(SMTP_URL)
const app = await buildApp({ mailer, logFile: LOG_FILE, logger: { level: LOG_LEVEL } })

const grace = closeWithGrace(async ({ err }) => {
  if (err !== undefined) app.log.fatal({ err }, 'closing because of an error')
  await app.close()
})

try {
  const address = await app.listen({ port: Number(PORT), host: HOST })
  if (demo) await demonstrate(app, address, LOG_FILE)
} catch (error) {
  console.error(isPortTaken(error) ? `Port ${PORT} is taken. Choose another one, such as: PORT=3001 npm run example` : error)
  grace.uninstall()
  await app.close()
  process.exitCode = 1
}

async function mailerToInbox (): Promise<Mailer> {
  const inbox = await openInbox(printMail)
  const mailer = smtpMailer(inbox.url)
  return {
    sendMail: mailer.sendMail,
    async close () {
      await mailer.close()
      await inbox.close()
    }
  }
}

function isPortTaken (error: unknown): boolean {
  return error instanceof Error && 'code' in error && error.code === 'EADDRINUSE'
}
