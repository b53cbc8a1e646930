/** What an error of Redis, ioredis or BullMQ tells, without what must not reach a log. */
import { readOr } from '../../foreign.js'
import { messageOf, plainError } from '../plain-error.js'

/** Answers of a server that is up and refuses writes: a replica, such as an old master after a failover, or a server that loads its data. */
const CANNOT_WRITE = /^(?:ERR Error running script.*? -)?(READONLY|UNBLOCKED|MASTERDOWN|LOADING|NOREPLICAS)\b/s
/** Answers to a job that the server will never store. */
const NEVER_STORED = /exceeds maximum allowed size|invalid bulk length|max(?:imum)? request size|exceeds the limit \d+ bytes/i
/** Words of ioredis for a command that it did not send. They do not say why there is no connection. */
const NOT_SENT = /^(?:Stream isn't writeable|Cluster isn't ready|Connection is closed|Reached the max retries|None of startup nodes)/

export function cannotWrite (error: unknown): boolean {
  return CANNOT_WRITE.test(messageOf(error))
}

export function isNeverStored (error: unknown): boolean {
  return NEVER_STORED.test(plainRedisError(error).message)
}

export function isNotSent (error: unknown): boolean {
  return NOT_SENT.test(messageOf(error))
}

/**
 * What an error may tell. Redis repeats the arguments of a command that it does not know. An outage has one message, and not one for each
 * script, job or attempt.
 */
export function plainRedisError (error: unknown): Error {
  // A transaction was discarded because of the first of these. A cluster has failed because of the error of its last node.
  const cause = readOr(undefined, () => (error as { readonly previousErrors?: readonly unknown[] }).previousErrors?.[0]) ?? error
  const ofNode = readOr(undefined, () => (error as { readonly lastNodeError?: unknown }).lastNodeError)
  const message = messageOf(cause)
  const [, refusal] = CANNOT_WRITE.exec(message) ?? []
  // A wait for jobs is told so in another way.
  const word = refusal === 'UNBLOCKED' ? 'READONLY' : refusal
  if (word !== undefined) return plainError(undefined, `${word}: the server is up and refuses writes. All connections are replaced`)
  return plainError(cause, message
    .replace(/, with args beginning with: .*/s, '')
    .replace(/ script: [0-9a-f]{40}.*/s, '')
    .replace(/^Too many Cluster redirections\..*/s, 'No node of the Redis Cluster takes the command')
    .replace(/ Retrying from scratch after \d+ms\./, '')
    .replace(/ Last error: Connection is closed\.$/, '')
    .replace(/\bjob \S+?(?=[\s.]|$)/, 'a job') + (ofNode === undefined || ofNode === null ? '' : ` ${messageOf(ofNode)}`))
}
