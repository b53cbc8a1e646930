/**
 * The code blocks of the documentation as modules of one TypeScript program, beside the pages that they are in. They use the
 * package as its users do, built: what is internal is not there.
 */
import { readdirSync } from 'node:fs'
import { basename, join, posix } from 'node:path'
import ts from 'typescript'
import type { Block } from './pages.js'

export interface Complaint {
  readonly page: string
  readonly line: number
  /** With the line of code. */
  readonly text: string
}

interface Module {
  readonly block: Block
  /** From the root. */
  readonly path: string
  readonly text: string
}

/** What a block declares at its top: the name, and whether there is only a type of it. */
type Declared = Map<string, { readonly isType: boolean, readonly isExported: boolean }>

/** What TypeScript says about the blocks. */
export function compile (root: string, blocks: readonly Block[]): Complaint[] {
  const modules = toModules(blocks)
  const texts = new Map(modules.map(({ path, text }) => [join(root, path), text]))
  const ambient = readdirSync(import.meta.dirname).filter(name => name.endsWith('.d.ts')).map(name => join(import.meta.dirname, name))
  const options = optionsOf(root)
  const program = ts.createProgram([...texts.keys(), ...ambient], options, hostOf(options, texts))
  const ofAmbient = ambient.flatMap(path => diagnosticsOf(program, path).map(found => complaint(posix.join('test/support/docs', basename(path)), found, 0)))
  return [...ofAmbient, ...modules.flatMap(({ block, path }) => {
    const found = diagnosticsOf(program, join(root, path))
    // A parameter without a type is what JavaScript has.
    const meant = block.language === 'js' ? found.filter(({ code }) => code < 7005 || code > 7053) : found
    // The module has one line before the block's first.
    return meant.map(found => complaint(block.page, found, block.line - 2))
  })]
}

/** A block as a file that Node runs; its stacks name the page and the lines there. */
export function toProgram (root: string, block: Block): { name: string, text: string } {
  const { outputText } = ts.transpileModule('\n'.repeat(block.line - 1) + block.code, {
    fileName: join(root, block.page),
    compilerOptions: { target: ts.ScriptTarget.ES2022, module: ts.ModuleKind.ESNext, verbatimModuleSyntax: true, inlineSourceMap: true, sourceRoot: join(root, posix.dirname(block.page)) }
  })
  return { name: extensionsOf(block).source === '.cjs' ? 'program.cjs' : 'program.mjs', text: outputText }
}

/** Those of tsconfig.json; but an example may hold something up that it does not use. */
function optionsOf (root: string): ts.CompilerOptions {
  const { config } = ts.readConfigFile(join(root, 'tsconfig.json'), ts.sys.readFile) as { config: { compilerOptions: unknown } }
  const { options } = ts.convertCompilerOptionsFromJson(config.compilerOptions, root)
  return { ...options, noUnusedLocals: false, noUnusedParameters: false, allowJs: true, checkJs: true }
}

function hostOf (options: ts.CompilerOptions, texts: ReadonlyMap<string, string>): ts.CompilerHost {
  const host = ts.createCompilerHost(options)
  const onDisk = { fileExists: host.fileExists, readFile: host.readFile, getSourceFile: host.getSourceFile }
  return Object.assign(host, {
    fileExists: path => texts.has(path) || onDisk.fileExists(path),
    readFile: path => texts.get(path) ?? onDisk.readFile(path),
    getSourceFile (path, version, ...rest) {
      const text = texts.get(path)
      return text === undefined ? onDisk.getSourceFile(path, version, ...rest) : ts.createSourceFile(path, text, version)
    }
  } satisfies Partial<ts.CompilerHost>)
}

function diagnosticsOf (program: ts.Program, path: string): ts.Diagnostic[] {
  const file = program.getSourceFile(path)
  return [...program.getSyntacticDiagnostics(file), ...program.getSemanticDiagnostics(file)]
}

function complaint (page: string, { file, start = 0, messageText, code }: ts.Diagnostic, linesBefore: number): Complaint {
  const { line = 0 } = file?.getLineAndCharacterOfPosition(start) ?? {}
  const text = `${ts.flattenDiagnosticMessageText(messageText, ' ')} (TS${code})`
  const source = file?.text.split('\n')[line]?.trim() ?? ''
  return { page, line: line + 1 + linesBefore, text: `${text} in: ${source}` }
}

/** A page is read from its top: a block has what those above it on the page have declared. */
function toModules (blocks: readonly Block[]): Module[] {
  const above = new Map<string, Map<string, { from: string, isType: boolean }>>()
  return blocks.map(block => {
    const { page, line, code } = block
    const known = above.get(page) ?? new Map<string, { from: string, isType: boolean }>()
    above.set(page, known)
    const { source, target } = extensionsOf(block)
    const file = ts.createSourceFile(`block${source}`, code, ts.ScriptTarget.Latest)
    const declared = declaredIn(file)
    const imports = [...namesIn(file)].flatMap(name => {
      const found = declared.has(name) ? undefined : known.get(name)
      if (found === undefined || (found.isType && source !== '.ts')) return []
      return `import { ${found.isType ? `type ${name}` : name} } from './${found.from}';`
    })
    const exports = [...declared].flatMap(([name, { isType, isExported }]) => isExported ? [] : isType ? `type ${name}` : name)
    const name = `${posix.basename(page)}.${line}`
    if (source === '.cjs') return { block, path: posix.join(posix.dirname(page), name + source), text: `\n${code}` }
    for (const [declaredName, { isType }] of declared) known.set(declaredName, { from: name + target, isType })
    return {
      block,
      path: posix.join(posix.dirname(page), name + source),
      text: `${imports.join(' ')}\n${code}\nexport { ${exports.join(', ')} }\n`
    }
  })
}

function extensionsOf ({ language, code }: Block): { source: string, target: string } {
  if (language === 'ts') return { source: '.ts', target: '.js' }
  const extension = isCommonJs(code) ? '.cjs' : '.mjs'
  return { source: extension, target: extension }
}

function isCommonJs (code: string): boolean {
  return /\brequire\(/.test(code) && !/^(?:import|export)\b/m.test(code)
}

function namesIn (file: ts.SourceFile): Set<string> {
  const names = new Set<string>()
  const visit = (node: ts.Node): void => {
    if (ts.isIdentifier(node)) names.add(node.text)
    ts.forEachChild(node, visit)
  }
  visit(file)
  return names
}

function declaredIn (file: ts.SourceFile): Declared {
  const declared: Declared = new Map()
  for (const statement of file.statements) {
    const isExported = ts.canHaveModifiers(statement) && has(statement, ts.SyntaxKind.ExportKeyword) && !has(statement, ts.SyntaxKind.DefaultKeyword)
    const declare = (name: ts.Node | undefined, isType: boolean): void => {
      if (name !== undefined && ts.isIdentifier(name)) declared.set(name.text, { isType, isExported })
    }
    if (ts.isVariableStatement(statement)) for (const { name } of statement.declarationList.declarations) declareAll(name, declare)
    else if (ts.isFunctionDeclaration(statement) || ts.isClassDeclaration(statement)) declare(statement.name, false)
    else if (ts.isInterfaceDeclaration(statement) || ts.isTypeAliasDeclaration(statement)) declare(statement.name, true)
    else if (ts.isImportDeclaration(statement)) declareImports(statement.importClause, declare)
  }
  return declared
}

type Declare = (name: ts.Node | undefined, isType: boolean) => void

function declareAll (name: ts.BindingName, declare: Declare): void {
  if (ts.isIdentifier(name)) declare(name, false)
  else for (const element of name.elements) if (ts.isBindingElement(element)) declareAll(element.name, declare)
}

function declareImports (clause: ts.ImportClause | undefined, declare: Declare): void {
  const isType = clause?.phaseModifier === ts.SyntaxKind.TypeKeyword
  declare(clause?.name, isType)
  const bindings = clause?.namedBindings
  if (bindings === undefined) return
  if (ts.isNamespaceImport(bindings)) declare(bindings.name, isType)
  else for (const { name, isTypeOnly } of bindings.elements) declare(name, isType || isTypeOnly)
}

function has (node: ts.HasModifiers, kind: ts.SyntaxKind): boolean {
  return ts.getModifiers(node)?.some(modifier => modifier.kind === kind) ?? false
}
