/** What the examples of docs/frameworks.md have done, in order, for the tests to read. */
export const journal: string[] = []

/** What was written since it was last asked. */
export const takeJournal = (): string[] => journal.splice(0)

export async function writeLog (line: string): Promise<void> {
  journal.push(line)
}
