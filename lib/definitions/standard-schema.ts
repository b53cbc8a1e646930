/** The part of https://standardschema.dev that is used here. It is written out, so that the published types need no schema library. */
export interface StandardSchema<Input = unknown, Output = Input> {
  /** What a schema library tells about its schema. */
  readonly '~standard': {
    readonly version: 1
    readonly vendor: string
    /** Checks a value, and returns the schema's output for it. */
    readonly validate: (value: unknown) => StandardResult<Output> | Promise<StandardResult<Output>>
    readonly types?: { readonly input: Input, readonly output: Output } | undefined
  }
}

export type StandardResult<Output> =
  | { readonly value: Output, readonly issues?: undefined }
  | { readonly issues: readonly StandardIssue[] }

export interface StandardIssue {
  readonly message: string
  readonly path?: ReadonlyArray<PropertyKey | { readonly key: PropertyKey }> | undefined
}

export type InferInput<S extends StandardSchema> = NonNullable<S['~standard']['types']>['input']
export type InferOutput<S extends StandardSchema> = NonNullable<S['~standard']['types']>['output']

export function isStandardSchema (value: unknown): value is StandardSchema {
  if (value === null || (typeof value !== 'object' && typeof value !== 'function')) return false
  const standard = (value as { '~standard'?: { validate?: unknown } })['~standard']
  return typeof standard?.validate === 'function'
}

/**
 * The path and the reason of an issue, without the value. The messages of some libraries (valibot, arktype) quote the value, so the reason
 * is made from what the libraries tell about the schema.
 */
export function reasonOf (issue: StandardIssue = { message: '' }): { path: string, reason: string } {
  const { expected, code, type, kind } = issue as StandardIssue & Partial<Record<'expected' | 'code' | 'type' | 'kind', unknown>>
  const path = (issue.path ?? []).map(part => `/${String(typeof part === 'object' ? part.key : part)}`).join('')
  if (typeof expected === 'string') return { path, reason: `must be ${expected}` }
  const rule = [code, type, kind].find(word => typeof word === 'string')
  return { path, reason: rule === undefined ? 'is refused by its schema' : `is refused by its schema (${String(rule)})` }
}
