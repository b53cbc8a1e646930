import type { Test } from 'tap'

/**
 * What a test needs of the machine; a loud line where it is missing, and an error where it has to be there.
 * @param variable the name of the environment variable that says that it has to be there
 */
export async function opened<T> (t: Test, name: string, open: () => Promise<T>, variable = 'REQUIRE_ENGINES'): Promise<T | undefined> {
  try {
    return await open()
  } catch (error) {
    if ((process.env[variable] ?? '') !== '') throw new Error(`${name} is not there, and ${variable} is set: ${String(error)}`)
    console.error(`\n*** ${name} is not there: its tests are SKIPPED (${String(error)}) ***\n`)
    t.comment(`${name} is not there: skipped`)
    return undefined
  }
}
