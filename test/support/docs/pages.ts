/** The pages that people read, README.md and those of docs/: their code blocks, the anchors of their headings, their links. */
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'

export interface Page {
  /** From the root, with `/`. */
  readonly path: string
  readonly text: string
}

export interface Block {
  readonly page: string
  /** Of its first line of code; lines are counted from 1. */
  readonly line: number
  readonly language: 'ts' | 'js'
  /** Whether its fence says that it is a whole program: `ts run`. */
  readonly runs: boolean
  readonly code: string
}

export interface Link {
  readonly line: number
  /** Relative to the page, without the anchor; empty within the page. */
  readonly path: string
  readonly anchor: string
}

interface Fence {
  /** Of its opening line. */
  readonly line: number
  readonly info: string
  readonly code: string
  readonly closed: boolean
}

/** README.md and docs/, with the generated pages only if they are asked for. */
export function readPages (root: string, { generated }: { readonly generated: boolean }): Page[] {
  const names = readdirSync(join(root, 'docs'), { recursive: true, encoding: 'utf8' }).map(name => name.replaceAll('\\', '/'))
  const written = names.filter(name => name.endsWith('.md') && (generated || !name.startsWith('reference/')))
  return ['README.md', ...written.sort().map(name => `docs/${name}`)].map(path => readPage(root, path))
}

export function readPage (root: string, path: string): Page {
  return { path, text: readFileSync(join(root, path), 'utf8').replaceAll('\r\n', '\n') }
}

const LANGUAGES: Readonly<Record<string, 'ts' | 'js'>> = { ts: 'ts', js: 'js' }
/** They would escape the check. */
const OTHER_NAMES = /^(?:typescript|javascript|[mc]?[tj]sx?|node)$/i

/** The blocks in TypeScript and JavaScript, those that readers do not see (`<!-- ts`) among them. What is wrong with a fence is told to `complain`. */
export function blocksOf (page: Page, complain: (line: number, what: string) => void): Block[] {
  return fencesOf(page.text).flatMap(({ line, info, code, closed }) => {
    const [name = '', ...words] = info.split(/\s+/)
    const language = LANGUAGES[name]
    if (!closed) complain(line, 'this block of code is never closed')
    if (language === undefined) {
      if (OTHER_NAMES.test(name)) complain(line, `a block of "${name}" is not checked: say "ts" or "js"`)
      return []
    }
    for (const word of words.filter(word => word !== 'run')) complain(line, `"${word}" behind "${name}" means nothing: only "run" does`)
    return [{ page: page.path, line: line + 1, language, runs: words.includes('run'), code }]
  })
}

/** The anchors that GitHub gives to the headings of a page, and those written by hand. */
export function anchorsOf ({ text }: Page): Set<string> {
  const prose = withoutFences(text)
  const anchors = new Set(Array.from(prose.matchAll(/<a\s[^>]*?(?:id|name)="([^"]+)"/g), ([, name]) => name as string))
  for (const [, heading = ''] of prose.matchAll(/^ {0,3}#{1,6}[ \t]+(.*?)[ \t]*#*$/gm)) {
    const anchor = anchorOf(heading)
    let unique = anchor
    for (let n = 1; anchors.has(unique); n++) unique = `${anchor}-${n}`
    anchors.add(unique)
  }
  return anchors
}

function anchorOf (heading: string): string {
  const text = heading.replace(/!?\[([^\]]*)\]\([^)]*\)/g, '$1')
  return text.toLowerCase().replace(/[^\p{L}\p{M}\p{N}\p{Pc}\- ]/gu, '').replaceAll(' ', '-')
}

const LINKS = [
  /\]\(\s*<?([^)\s>]+)>?(?:\s+"[^"]*")?\s*\)/g,
  /^ {0,3}\[[^\]]+\]:\s+<?([^\s>]+)/gm,
  /\s(?:href|src)="([^"]+)"/g
]

/** Links to this repository. */
export function linksOf ({ text }: Page): Link[] {
  const prose = withoutCode(text)
  const found = LINKS.flatMap(link => [...prose.matchAll(link)])
  return found.flatMap(({ 1: target = '', index }) => {
    if (/^(?:[a-z][a-z\d+.-]*:|\/\/)/i.test(target)) return []
    const [path = '', anchor = ''] = target.split('#', 2)
    return { line: prose.slice(0, index).split('\n').length, path: decodeURI(path), anchor: decodeURI(anchor) }
  })
}

function fencesOf (text: string): Fence[] {
  const fences: Fence[] = []
  const lines = text.split('\n')
  for (let at = 0; at < lines.length; at++) {
    const [, indent = '', mark, info = ''] = lines[at]?.match(/^(\s*)(`{3,}|~{3,}|<!--(?= ts$))\s*([^`]*?)\s*$/) ?? []
    if (mark === undefined) continue
    const end = lines.findIndex((line, index) => index > at && isClosing(line, mark))
    const code = lines.slice(at + 1, end === -1 ? undefined : end).map(line => line.startsWith(indent) ? line.slice(indent.length) : line.trimStart())
    fences.push({ line: at + 1, info, code: code.join('\n'), closed: end !== -1 })
    if (end === -1) break
    at = end
  }
  return fences
}

function isClosing (line: string, mark: string): boolean {
  const text = line.trim()
  if (mark === '<!--') return text === '-->'
  return text.length >= mark.length && text === (mark[0] as string).repeat(text.length)
}

/** Empty lines in place of the blocks of code, so that all else keeps its line. */
function withoutFences (text: string): string {
  const lines = text.split('\n')
  for (const { line, code } of fencesOf(text)) lines.fill('', line - 1, line + code.split('\n').length + 1)
  return lines.join('\n')
}

function withoutCode (text: string): string {
  return withoutFences(text).replace(/(?<!`)(`+)(?!`)(?:(?!\n\n)[\s\S])*?(?<!`)\1(?!`)/g, code => code.replace(/[^\n]/g, '.'))
}
