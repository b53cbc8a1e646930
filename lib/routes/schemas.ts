/**
 * The schemas of the operator's routes, in plain JSON Schema. They document the routes. Nothing is checked or written by them, because the
 * app may have compilers that understand another kind of schema.
 */
import type { FastifySchema } from 'fastify'
import { JOB_STATES, MAX_LIMIT } from '../decorators/operating.js'

type Schema = Readonly<Record<string, unknown>>

const STRING = { type: 'string' }
const COUNT = { type: 'integer', minimum: 0 }
const TIME = { type: 'string', format: 'date-time' }

const object = (properties: Schema, optional: readonly string[] = [], description?: string): Schema => ({
  type: 'object',
  ...description !== undefined && { description },
  properties,
  required: Object.keys(properties).filter(name => !optional.includes(name))
})

const failure = (description: string): Schema =>
  object({ statusCode: { type: 'integer' }, code: STRING, error: STRING, message: STRING }, ['code'], description)

const UNAVAILABLE = { 503: failure('The engine cannot be reached, or the app is closing. There is a Retry-After') }
const UNKNOWN_NAME = { 404: failure('There is no definition of this name') }
const UNKNOWN_TASK = { 404: failure('There is no definition of this name, or no such task, or its record is not kept any more') }
const UNSUPPORTED = { 501: failure('The engine cannot do that') }

const COUNTS = object({ name: STRING, pending: COUNT, delayed: COUNT, running: COUNT, retrying: COUNT, failed: COUNT }, ['delayed', 'running', 'retrying'])

const HEALTH = object({
  engine: { type: 'string', nullable: true, description: 'Null without an engine' },
  connected: { type: 'boolean' },
  consuming: { type: 'array', items: STRING, description: 'The definitions whose tasks this process runs' },
  error: { type: 'string', description: 'Why the engine cannot be reached, without hosts and ports' }
}, ['error'])

const recordOf = (withPayload: boolean): Schema => object({
  id: STRING,
  name: STRING,
  state: { type: 'string', enum: JOB_STATES },
  attempt: { ...COUNT, description: 'Attempts so far' },
  enqueuedAt: TIME,
  startedAt: TIME,
  finishedAt: TIME,
  error: object({ name: STRING, message: STRING, code: STRING }, ['code'], 'The error of the last attempt'),
  result: { description: 'What the handler returned, as JSON' },
  ...withPayload && { payload: { description: 'The payload, if somebody still has it' } }
}, ['startedAt', 'finishedAt', 'error', 'result', 'payload'])

const NAME_PARAMS = object({ name: { ...STRING, description: 'The name of a definition' } })
const TASK_PARAMS = object({ name: { ...STRING, description: 'The name of a definition' }, id: { ...STRING, description: 'The id of a task' } })
const PAGE_QUERY = object({
  state: { type: 'string', enum: JOB_STATES },
  limit: { type: 'integer', minimum: 1, maximum: MAX_LIMIT, default: 50, description: 'The most records' },
  after: { ...STRING, description: 'The "next" of the page before' }
}, ['limit', 'after'])

const ACCEPTED = object({ id: STRING, name: STRING })
const tags = ['background tasks']

export interface RouteSchemas {
  readonly counts: FastifySchema
  readonly health: FastifySchema
  readonly page: FastifySchema
  readonly record: FastifySchema
  readonly retry: FastifySchema
  readonly cancel: FastifySchema
}

/** @param withPayloads whether records carry payloads */
export function schemasOf (withPayloads: boolean): RouteSchemas {
  const record = recordOf(withPayloads)
  const described = (schema: { readonly summary: string, readonly response: object } & FastifySchema): FastifySchema => ({ tags, ...schema } as FastifySchema)
  return {
    counts: described({
      summary: 'Count the background tasks of each definition',
      response: { 200: { type: 'array', items: COUNTS, description: 'The counts of all processes, now' }, ...UNSUPPORTED, ...UNAVAILABLE }
    }),
    health: described({
      summary: 'Tell whether background tasks can be stored and run',
      response: { 200: { ...HEALTH, description: 'The engine can be reached' }, 503: { ...HEALTH, description: 'The engine cannot be reached' } }
    }),
    page: described({
      summary: 'List the background tasks of a definition that have one state, newest first',
      params: NAME_PARAMS,
      querystring: PAGE_QUERY,
      response: {
        200: object({ records: { type: 'array', items: record }, next: STRING }, ['next'], 'Without "next" this is the last page'),
        400: failure('A parameter has a wrong value'),
        ...UNKNOWN_NAME,
        ...UNSUPPORTED,
        ...UNAVAILABLE
      }
    }),
    record: described({
      summary: 'Read a background task',
      params: TASK_PARAMS,
      response: { 200: { ...record, description: 'What has become of the task so far' }, ...UNKNOWN_TASK, ...UNSUPPORTED, ...UNAVAILABLE }
    }),
    retry: described({
      summary: 'Start a background task again that has failed for good',
      params: TASK_PARAMS,
      response: { 202: { ...ACCEPTED, description: 'It will start' }, ...UNKNOWN_TASK, 409: failure('The task has not failed'), ...UNSUPPORTED, ...UNAVAILABLE }
    }),
    cancel: described({
      summary: 'Cancel a background task',
      params: TASK_PARAMS,
      response: { 202: { ...ACCEPTED, description: 'It does not run any more' }, ...UNKNOWN_TASK, 409: failure('The task has ended'), ...UNSUPPORTED, ...UNAVAILABLE }
    })
  }
}
