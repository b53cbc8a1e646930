const HEADERS = /^(From|To|Subject):/

/** Prints a mail as a person reads it. */
export function printMail (source: string): void {
  const [head = '', ...body] = source.split('\r\n\r\n')
  const headers = head.split('\r\n').filter(line => HEADERS.test(line))
  printBlock('Mail arrived', [...headers, '', ...body.join('\n\n').trim().split('\r\n')])
}

/** Prints a title, and lines below it. */
export function printBlock (title: string, lines: readonly string[]): void {
  console.log([title, ...lines.map(line => `  ${line}`.trimEnd()), ''].join('\n'))
}
