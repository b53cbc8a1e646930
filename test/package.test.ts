// The package as npm publishes it: built and packed from the sources, unpacked into an empty folder, and used from there by the
// modules of types/consumers.
import { execFile, execFileSync } from 'node:child_process'
import {
  cpSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, realpathSync, renameSync, rmSync, symlinkSync, writeFileSync
} from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { dirname, join, posix } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { promisify } from 'node:util'
import Fastify from 'fastify'
import t from 'tap'
import ts from 'typescript'
import type { addTask } from '../lib/ambient.js'
import * as source from '../lib/index.js'
import { linksOf, readPages } from './support/docs/pages.js'

const root = fileURLToPath(new URL('..', import.meta.url))
const require = createRequire(import.meta.url)
const MAX_PACKED_KB = 265

interface Packed {
  filename: string
  size: number
  unpackedSize: number
  files: Array<{ path: string }>
}

/** What a module of types/consumers exports. */
interface Consumer {
  plugins: unknown[]
  names?: string[]
  routes?: unknown[]
  BackgroundTask: typeof source.BackgroundTask
  makeTask: () => source.BackgroundTask
  addHere?: typeof addTask
  serve: (task: source.BackgroundTask) => Promise<source.TaskState>
}

interface Manifest {
  main: string
  types: string
  exports: Record<string, string | Record<string, string>>
  dependencies: Record<string, string>
  scripts: Record<string, string>
}

// It compiles, twice.
t.setTimeout(180_000)

const packed = await pack(t.testdir())
const files = packed.files.map(file => file.path)
const folder = install(packed.filename)
const installed = join(folder, 'node_modules', 'fastify-background-tasks')
const manifest: Manifest = JSON.parse(readFileSync(join(installed, 'package.json'), 'utf8'))

t.test('the tarball holds the build, the license and the documentation, and nothing else', async t => {
  const beside = files.filter(path => !path.startsWith('dist/') && !path.startsWith('docs/'))
  t.same(beside.sort(), ['CHANGELOG.md', 'LICENSE', 'README.md', 'package.json'])
  const pages = readPages(root, { generated: true }).map(page => page.path).filter(path => path !== 'README.md')
  t.same(files.filter(path => path.startsWith('docs/')).sort(), pages.sort(), 'the pages of the documentation')
  const built = files.filter(path => path.startsWith('dist/') && path !== 'dist/package.json')
  t.same(built.filter(path => !/^dist\/([\w-]+\/)*[\w-]+\.(js|d\.ts|cjs)$/.test(path)), [], 'no sources, maps or tests')
  const modules = readdirSync(join(root, 'lib'), { recursive: true, encoding: 'utf8' })
    .filter(path => path.endsWith('.ts') && !path.startsWith('commonjs'))
    .map(path => path.replaceAll('\\', '/').slice(0, -'.ts'.length))
  const named = (end: string): string[] => built.filter(path => path.endsWith(end)).map(path => path.slice('dist/'.length, -end.length)).sort()
  t.same(named('.js'), [...modules, 'plugin', 'task-routes'].sort(), 'each module of lib, and what import and require load')
  t.same(named('.d.ts').filter(name => !named('.js').includes(name)), [], 'declarations of modules')
})

t.test('the tarball is small', async t => {
  const kilobytes = packed.size / 1000
  t.comment(`packed ${kilobytes.toFixed(1)} kB, unpacked ${(packed.unpackedSize / 1000).toFixed(1)} kB, ${files.length} files`)
  t.ok(kilobytes < MAX_PACKED_KB, `below ${MAX_PACKED_KB} kB`)
})

t.test('a link of the readme or of the documentation leads somewhere in node_modules, unless it leads to sources', async t => {
  for (const page of readPages(installed, { generated: true })) {
    const targets = linksOf(page).map(({ path }) => path === '' ? page.path : posix.join(posix.dirname(page.path), path))
    const dead = targets.filter(path => !/^(?:lib|test|examples)(?:\/|$)/.test(path) && !existsSync(join(installed, path)))
    t.same(dead, [], page.path)
  }
})

t.test('package.json points to files that are there, and runs nothing at installation', async t => {
  const targets = Object.values(manifest.exports).flatMap(entry => typeof entry === 'string' ? entry : Object.values(entry))
  for (const path of [manifest.main, manifest.types, ...targets]) t.ok(existsSync(join(installed, path)), path)
  for (const script of ['preinstall', 'install', 'postinstall', 'prepare']) t.notOk(manifest.scripts[script], `no ${script} script`)
})

t.test('TypeScript accepts an ES module and a CommonJS module that use it, and its declarations', async t => {
  const tsc = join(dirname(require.resolve('typescript/package.json')), 'bin', 'tsc')
  const said = await promisify(execFile)(process.execPath, [tsc, '-p', folder]).then(() => '', error => error.stdout)
  t.equal(said, '')
})

t.test('every value that the sources export is a named export, for import and for require', async t => {
  const exported = Object.keys(source).sort()
  const esm = await load('esm.mjs')
  const cjs = await load('cjs.cjs')
  // Since Node 23 a namespace of a CommonJS module has this name, too.
  t.same(esm.names?.filter(name => name !== 'module.exports').sort(), exported)
  t.same(cjs.names?.sort(), exported)
})

t.test('every type that the sources export is exported by the declarations of the plugin', async t => {
  const [index, plugin] = ['index.d.ts', 'plugin.d.ts'].map(name => join(installed, 'dist', name)) as [string, string]
  const program = ts.createProgram([index, plugin], { module: ts.ModuleKind.NodeNext, strict: true, types: ['node'] })
  const checker = program.getTypeChecker()
  const namesOf = (path: string): string[] => {
    const file = program.getSourceFile(path)
    const symbol = file === undefined ? undefined : checker.getSymbolAtLocation(file)
    if (symbol === undefined) throw new Error(`${path} is no module`)
    const exported = symbol.exports?.get(ts.InternalSymbolName.ExportEquals)
    const names = exported === undefined ? checker.getExportsOfModule(symbol) : checker.getExportsOfModule(unaliased(exported))
    return names.map(({ name }) => name).filter(name => name !== 'prototype').sort()
  }
  const unaliased = (symbol: ts.Symbol): ts.Symbol => {
    return (symbol.flags & ts.SymbolFlags.Alias) === 0 ? symbol : checker.getAliasedSymbol(symbol)
  }
  const exported = namesOf(index)
  t.ok(exported.includes('TaskOptions'), 'types are among them')
  t.same(namesOf(plugin), exported)
})

t.test('import, require and what compilers make of them give one plugin', async t => {
  const consumers = await loadAll()
  const { plugins: [plugin], BackgroundTask } = await load('esm.mjs')
  t.type(plugin, 'function')
  for (const [name, consumer] of Object.entries(consumers)) {
    for (const other of consumer.plugins) t.equal(other, plugin, `the plugin of ${name}`)
    t.equal(consumer.BackgroundTask, BackgroundTask, `the BackgroundTask of ${name}`)
  }
})

t.test('import and require of the routes give one plugin', async t => {
  const [first, ...others] = (await Promise.all(['esm.mjs', 'cjs.cjs', 'from-esm.mjs', 'from-cjs.cjs', 'ts-jest.cjs', 'ts-jest-plain.cjs'].map(load))).flatMap(({ routes = [] }) => routes)
  t.type(first, 'function')
  t.equal(others.length, 13)
  for (const other of others) t.equal(other, first)
})

t.test('import and require of the ambient addTask find the same request', async t => {
  const [esm, cjs, compiled] = await Promise.all(['esm.mjs', 'cjs.cjs', 'from-cjs.cjs'].map(load)) as [Consumer, Consumer, Consumer]
  const added: string[] = []
  const app = Fastify()
  await app.register(esm.plugins[0] as typeof source.default, { ambient: true })
  app.get('/', async () => {
    for (const [name, { addHere }] of Object.entries({ esm, cjs, compiled })) addHere?.((name: string) => { added.push(name) }, name)
  })
  await app.inject('/')
  await app.close()
  t.same(added, ['esm', 'cjs', 'compiled'])
})

t.test('a task made by one kind of module runs in an app made by another', async t => {
  const consumers = await loadAll()
  for (const [maker, { makeTask }] of Object.entries(consumers)) {
    for (const [server, { serve }] of Object.entries(consumers)) {
      t.equal(await serve(makeTask()), 'succeeded', `made by ${maker}, run by ${server}`)
    }
  }
})

function load (name: string): Promise<Consumer> {
  return import(pathToFileURL(join(folder, name)).href)
}

async function loadAll (): Promise<Record<string, Consumer>> {
  const names = ['esm.mjs', 'cjs.cjs', 'babel.cjs', 'from-esm.mjs', 'from-cjs.cjs', 'ts-jest.cjs', 'ts-jest-plain.cjs']
  return Object.fromEntries(await Promise.all(names.map(async name => [name, await load(name)])))
}

/** Builds and packs a copy of the sources, so that it is of now, and nobody else's build is in the way. */
async function pack (folder: string): Promise<Packed> {
  for (const name of ['lib', 'package.json', 'tsconfig.json', 'LICENSE', 'README.md', 'CHANGELOG.md', 'docs', '.ci']) {
    if (existsSync(join(root, name))) cpSync(join(root, name), join(folder, name), { recursive: true })
  }
  const npm = async (...args: string[]): Promise<string> => {
    const { stdout } = await promisify(execFile)('npm', args, { cwd: folder, shell: process.platform === 'win32' })
    return stdout
  }
  await npm('run', 'prepack')
  const [packed]: [Packed] = JSON.parse(await npm('pack', '--json', '--ignore-scripts'))
  return { ...packed, filename: join(folder, packed.filename) }
}

/** A folder that has the package, what it depends on, and Fastify: what is missing in package.json is missing there, too. */
function install (tarball: string): string {
  const folder = realpathSync(mkdtempSync(join(tmpdir(), 'fastify-background-tasks-')))
  t.teardown(() => { rmSync(folder, { recursive: true, force: true }) })
  const modules = join(folder, 'node_modules')
  mkdirSync(modules)
  writeFileSync(join(folder, 'package.json'), '{ "private": true }')
  unpack(tarball, modules)
  const { dependencies }: Manifest = JSON.parse(readFileSync(join(modules, 'fastify-background-tasks', 'package.json'), 'utf8'))
  for (const name of [...Object.keys(dependencies), 'fastify', '@types/node']) {
    mkdirSync(dirname(join(modules, name)), { recursive: true })
    symlinkSync(realpathSync(join(root, 'node_modules', name)), join(modules, name), 'junction')
  }
  cpSync(join(root, 'types', 'consumers'), folder, { recursive: true })
  transpile(folder)
  return folder
}

function unpack (tarball: string, modules: string): void {
  execFileSync('tar', ['-xzf', tarball, '-C', modules])
  renameSync(join(modules, 'package'), join(modules, 'fastify-background-tasks'))
}

/** The consumers in TypeScript as compilers emit them; ts-jest makes CommonJS of an ES module, with and without `esModuleInterop`. */
function transpile (folder: string): void {
  const emit = (from: string, to: string, options: ts.CompilerOptions): void => {
    const { outputText } = ts.transpileModule(readFileSync(join(folder, from), 'utf8'), {
      compilerOptions: { target: ts.ScriptTarget.ES2022, ...options }
    })
    writeFileSync(join(folder, to), outputText)
  }
  emit('esm.mts', 'from-esm.mjs', { module: ts.ModuleKind.ESNext })
  emit('cjs.cts', 'from-cjs.cjs', { module: ts.ModuleKind.CommonJS })
  emit('esm.mts', 'ts-jest.cjs', { module: ts.ModuleKind.CommonJS, esModuleInterop: true })
  emit('esm.mts', 'ts-jest-plain.cjs', { module: ts.ModuleKind.CommonJS, esModuleInterop: false })
}
