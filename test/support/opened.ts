import type { Test } from 'tap'

/** What a test needs of the machine; a loud line where it is missing, and an error where it has to be there. */
export async function opened<T> (t: Test, name: string, open: () => Promise<T>): Promise<T | undefined> {
  try {
    return await open()
  } catch (error) {
    const { REQUIRE_ENGINES } = process.env
    if (REQUIRE_ENGINES !== undefined && REQUIRE_ENGINES !== '') throw new Error(`${name} is not there, and REQUIRE_ENGINES is set: ${String(error)}`)
    console.error(`\n*** ${name} is not there: its tests are SKIPPED (${String(error)}) ***\n`)
    t.comment(`${name} is not there: skipped`)
    return undefined
  }
}
