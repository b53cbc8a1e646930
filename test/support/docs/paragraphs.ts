/** Whether the code of a page is the code that a test runs. */
import { readFileSync } from 'node:fs'

/** The lines of a text without what stands before them: code of a page stands within a function of its module, or is exported. */
const unindented = (text: string): string => `\n${text.split('\n').map(line => line.trim().replace(/^export /, '')).join('\n')}\n`

/**
 * @param modules those that are run, from `test/`. Code in JavaScript counts if one of them is in it
 * @param heading one section of the page. Default: the whole page
 * @returns the paragraphs of code of a page of `docs/`, without imports, and those of them that stand in no module
 */
export function paragraphsOf (page: string, modules: readonly string[], heading?: string): { all: string[], missing: string[] } {
  const read = (path: string): string => readFileSync(new URL(`../../${path}`, import.meta.url), 'utf8')
  const code = modules.map(path => unindented(read(path)))
  const text = read(`../docs/${page}`)
  const section = heading === undefined ? text : text.split(/^## /m).find(section => section.startsWith(`${heading}\n`)) ?? ''
  const fences = modules.some(path => path.endsWith('.js')) ? /^```[jt]s\n(.*?)^```$/gms : /^```ts\n(.*?)^```$/gms
  const blocks = Array.from(section.matchAll(fences), ([, block = '']) => block)
  const all = blocks
    .flatMap(block => block.replace(/^import (?:\{[^}]*\} from .*|.*)\n/gm, '').split('\n\n'))
    .filter(paragraph => paragraph.trim() !== '')
  return { all, missing: all.filter(paragraph => !code.some(text => text.includes(unindented(paragraph.trim())))) }
}
