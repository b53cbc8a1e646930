/** The Fastify that the tests run with: the newest, or the oldest that the package supports (.ci/fastify-5.0.0). */
import { createRequire } from 'node:module'

// `app.version` is not it: that of 5.7.0 says 5.6.2.
const { version } = createRequire(import.meta.url)('fastify/package.json') as { version: string }

/**
 * What a test that needs a newer Fastify has as its `skip`.
 * @returns the reason where this Fastify is older than `since`, or `false`
 */
export function beforeFastify (since: string, reason: string): string | false {
  return version.localeCompare(since, 'en', { numeric: true }) < 0 && `Fastify ${version} is older than ${since}: ${reason}`
}
