import { createReadStream } from 'node:fs'
import { rename, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { gzipSync } from 'node:zlib'

export default async function renderReport ({ source, folder }, { id }) {
  let html = '<!doctype html><table>'
  for await (const line of createInterface({ input: createReadStream(source) })) {
    html += `<tr>${line.split(',').map(cell => `<td>${cell.replaceAll('<', '&lt;')}</td>`).join('')}</tr>`
  }
  const path = join(folder, `${id}.html.gz`)
  await writeFile(`${path}.part`, gzipSync(html, { level: 9 }))
  await rename(`${path}.part`, path)   // the whole report, or none
  return { path, bytes: (await stat(path)).size }
}
