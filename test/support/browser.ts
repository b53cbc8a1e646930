/** A real browser, for pages of documentation. */
import { existsSync } from 'node:fs'
import { chromium, type Browser } from 'playwright-core'
import type { Test } from 'tap'

const CHROMIUM = process.env.CHROMIUM_PATH ?? '/usr/bin/chromium'

/** Why tests of a browser are skipped. */
export function withoutBrowser (): string | false {
  if (existsSync(CHROMIUM) || process.env.REQUIRE_BROWSER === '1') return false
  const reason = `NO BROWSER TEST: there is no ${CHROMIUM}. Install Debian's chromium, or set CHROMIUM_PATH.`
  console.error(reason)
  return reason
}

export async function openBrowser (t: Test): Promise<Browser> {
  const browser = await chromium.launch({
    executablePath: CHROMIUM,
    args: [
      '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
      '--disable-component-update', '--disable-sync'
    ]
  })
  t.teardown(() => browser.close())
  return browser
}
