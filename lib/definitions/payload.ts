import AjvCompiler from '@fastify/ajv-compiler'
import type { AnyTaskDefinition } from './define-task.js'
import type { Json } from '../engines/engine.js'
import { FST_BGT_INVALID_OPTION, FST_BGT_INVALID_PAYLOAD, PACKAGE } from '../errors.js'
import { isThenable } from '../foreign.js'
import { isStandardSchema, reasonOf, type StandardResult, type StandardSchema } from './standard-schema.js'

/**
 * Returns the schema's output for a payload that has been through JSON. The payload itself may be changed.
 * @throws FST_BGT_INVALID_PAYLOAD
 */
export type PayloadReader = (payload: unknown) => unknown

/** Compiles JSON Schemas: without coercion, with formats. */
export type SchemaCompiler = (schema: object) => JsonValidator

type JsonValidator = ((value: unknown) => unknown) & { errors?: readonly JsonSchemaError[] | null }

interface JsonSchemaError {
  readonly instancePath: string
  readonly message: string
  readonly params: { readonly additionalProperty?: unknown }
}

type SharedSchemas = Readonly<Record<string, unknown>>

/**
 * Makes the compiler for an app's definitions. Only the shared schemas that a definition refers to are compiled, because others may be of
 * another dialect, for the app's own validator.
 * @param shared the app's shared schemas, for `$ref`
 */
export function schemaCompiler (shared: SharedSchemas): SchemaCompiler {
  return schema => {
    const compile = AjvCompiler()(referredTo(schema, shared) as Record<string, object>, {
      customOptions: { coerceTypes: false, removeAdditional: false, useDefaults: true, allErrors: false }
    }) as unknown as (route: { schema: object }) => JsonValidator
    return compile({ schema })
  }
}

/**
 * The shared schemas that a schema refers to, and those that these refer to. If no shared schema has an id that is referred to, the result
 * is all of them, because the id may be inside one of them.
 */
function referredTo (schema: object, shared: SharedSchemas): SharedSchemas {
  const found: Record<string, unknown> = {}
  const seen = new Set<unknown>()
  const left: unknown[] = [schema]
  for (let value = left.pop(); value !== undefined; value = left.pop()) {
    if (typeof value !== 'object' || value === null || seen.has(value)) continue
    seen.add(value)
    const { $ref } = value as { $ref?: unknown }
    const [id = ''] = typeof $ref === 'string' ? $ref.split('#') : []
    if (id !== '' && found[id] === undefined) {
      const own = Object.hasOwn(shared, id) ? id : `${id}#`
      if (!Object.hasOwn(shared, own)) return shared
      found[own] = shared[own]
      left.push(shared[own])
    }
    left.push(...Object.values(value).filter(member => member !== undefined))
  }
  return found
}

/** @throws FST_BGT_INVALID_OPTION for a schema that cannot be compiled */
export function payloadReader ({ name, payload: schema }: AnyTaskDefinition, compile: SchemaCompiler): PayloadReader {
  if (schema === undefined) return payload => payload
  return isStandardSchema(schema) ? standardReader(name, schema) : jsonSchemaReader(name, schema as object, compile)
}

function standardReader (name: string, schema: StandardSchema): PayloadReader {
  return payload => {
    const result = schema['~standard'].validate(payload) as StandardResult<unknown>
    if (isThenable(result)) {
      throw new FST_BGT_INVALID_PAYLOAD(name, 'has an asynchronous schema, and addTask is synchronous')
    }
    if (result.issues === undefined) return result.value
    const { path, reason } = reasonOf(result.issues[0])
    throw new FST_BGT_INVALID_PAYLOAD(name, `is invalid: ${path || 'it'} ${reason}`)
  }
}

function jsonSchemaReader (name: string, schema: object, compile: SchemaCompiler): PayloadReader {
  let validate: JsonValidator
  try {
    validate = compile(schema)
  } catch (error) {
    throw new FST_BGT_INVALID_OPTION(`${PACKAGE}: The option "payload" of the task "${name}" accepts a JSON Schema; this one cannot be compiled: ${String(error)}`)
  }
  return payload => {
    if (validate(payload) === true) return payload
    // Ajv has set the errors of a value that is invalid.
    const { instancePath, message, params } = (validate.errors as JsonSchemaError[])[0] as JsonSchemaError
    const extra = params.additionalProperty === undefined ? '' : ` (${String(params.additionalProperty)})`
    throw new FST_BGT_INVALID_PAYLOAD(name, `is invalid: ${instancePath || 'it'} ${message}${extra}`)
  }
}

/**
 * A payload as JSON. `undefined` becomes `null`, as in an array.
 * @throws FST_BGT_INVALID_PAYLOAD for what JSON cannot hold: a BigInt, a cycle, a function
 */
export function toJson (name: string, payload: unknown): string {
  if (payload === undefined) return 'null'
  let text: string | undefined
  try {
    text = JSON.stringify(payload)
  } catch (error) {
    // The further lines of V8's message name the properties of a cycle.
    throw new FST_BGT_INVALID_PAYLOAD(name, `is not JSON: ${error instanceof TypeError ? error.message.replace(/\n[^]*/, '') : 'its toJSON threw'}`)
  }
  if (text === undefined) throw new FST_BGT_INVALID_PAYLOAD(name, `is not JSON: it is a ${typeof payload}`)
  return text
}

/** The result of a handler as JSON. `undefined` becomes `null`. Throws what `JSON.stringify` throws. */
export function resultToJson (result: unknown): Json {
  return JSON.parse(JSON.stringify(result) ?? 'null') as Json
}
