import { mkdtempSync } from 'node:fs'
import { appendFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/** Appends one line, whatever line breaks the message holds. */
export async function writeLog (file: string, message: string): Promise<void> {
  await appendFile(file, `${message.replaceAll(/[\r\n]+/g, ' ')}\n`)
}

/** A path for a log file of this run's own. */
export function temporaryLogFile (): string {
  return join(mkdtempSync(join(tmpdir(), 'notifications-')), 'log.txt')
}
