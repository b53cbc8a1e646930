import { execFileSync } from 'node:child_process'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

/** Files of a server for 127.0.0.1, and the certificate of who has signed its own. */
export interface Certificates {
  readonly key: string
  readonly cert: string
  readonly caFile: string
  /** The text of `caFile`. */
  readonly ca: string
}

/** Made by `openssl`, in a folder of the test. */
export function certificatesIn (dir: string): Certificates {
  const [caKey, caFile, key, request, cert, extensions] = ['ca.key', 'ca.pem', 'server.key', 'server.csr', 'server.pem', 'server.ext'].map(name => join(dir, name)) as [string, string, string, string, string, string]
  const openssl = (...args: string[]): void => { execFileSync('openssl', args, { stdio: 'pipe' }) }
  const newKey = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes']
  openssl('req', '-x509', ...newKey, '-keyout', caKey, '-out', caFile, '-subj', '/CN=fbt-test-ca', '-days', '2')
  openssl('req', ...newKey, '-keyout', key, '-out', request, '-subj', '/CN=127.0.0.1')
  writeFileSync(extensions, 'subjectAltName=IP:127.0.0.1,DNS:localhost\n')
  openssl('x509', '-req', '-in', request, '-CA', caFile, '-CAkey', caKey, '-CAcreateserial', '-out', cert, '-days', '2', '-extfile', extensions)
  return { key, cert, caFile, ca: readFileSync(caFile, 'utf8') }
}
