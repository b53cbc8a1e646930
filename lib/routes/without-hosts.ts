/** Messages of engines without the names of machines, for a reply that others may read than those who read the log. */

const LEFT_OUT = '…'

/** A word of a sentence, with the punctuation around it. A name with a dot, a colon, a slash or a digit is none. */
const WORD = /^["'(]*[a-z][a-z'_-]*["').,:;!?]*$/i
/** A number or a version. An address has four parts. */
const NUMBER = /^\(?\d+(?:\.\d+){0,2}[).,:;]*$/
/** Words that a host or a port may follow. Errors of Node name the host after their code. */
const NAMES_NEXT = /^\(?(?:E[A-Z_]{4,}|[Hh]osts?|[Hh]ostname|[Ss]ervername|[Aa]ddress|[Pp]ort|[Nn]ode|DNS|at)[:=]?$/
/** The same, after a word that begins with "connect". */
const CONNECTS_NEXT = /^(?:to|with|from)$/
/** Words that are no names of hosts. */
const COMMON = /^(?:a|an|and|after|are|because|by|did|does|for|had|has|in|is|may|no|not|of|on|or|server|that|the|was|were|when|which|while|within)[.,:;]?$/

/** Puts an ellipsis in the place of each word that may be a host, a port, an address or a path. It rather leaves out too much. */
export function withoutHosts (message: string): string {
  const words = message.split(/\s+/)
  const kept = words.map((word, i) => mayNameHost(word, words[i - 1] ?? '', words[i - 2] ?? '') ? LEFT_OUT : word)
  return kept.filter((word, i) => word !== LEFT_OUT || kept[i - 1] !== LEFT_OUT).join(' ')
}

function mayNameHost (word: string, previous: string, beforeThat: string): boolean {
  if (word === '') return false
  if (!WORD.test(word) && !NUMBER.test(word)) return true
  if (/localhost/i.test(word)) return true
  if (COMMON.test(word)) return false
  return NAMES_NEXT.test(previous) || (CONNECTS_NEXT.test(previous) && /^\(?connect/i.test(beforeThat))
}
