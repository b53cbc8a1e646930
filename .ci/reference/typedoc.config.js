import { Converter, ReferenceReflection, ReflectionGroup } from 'typedoc'
import { CompactTheme } from './theme.js'

/** What a file of lib is about: the group of what it exports. */
const GROUPS = {
  'The plugin': ['index', 'options'],
  Tasks: ['tasks/background-task', 'tasks/task-options', 'tasks/task-function', 'decorators/background-tasks', 'decorators/app-background-tasks', 'exchange/outcome', 'runner/ledger', 'decorators/task-adder'],
  Definitions: ['definitions/define-task', 'definitions/declare-task', 'definitions/thread', 'definitions/travelling-context', 'decorators/enqueue', 'decorators/operating', 'definitions/jobs', 'definitions/standard-schema'],
  'Diagnostics channels': ['tasks/diagnostics'],
  Engines: ['engines/engine']
}

/** @type {Partial<import('typedoc').TypeDocOptions>} */
export default {
  entryPoints: ['index', 'engines/bullmq/index', 'engines/pg-boss/index', 'engines/rabbitmq/index', 'testing', 'ambient', 'routes'].map(name => `../../lib/${name}.ts`),
  tsconfig: '../../lib/tsconfig.json',
  out: '../../docs/reference',
  plugin: ['typedoc-plugin-markdown', groupByFile, app => app.renderer.defineTheme('compact', CompactTheme)],
  theme: 'compact',
  router: 'module',
  readme: 'none',
  pageTitleTemplates: {
    index: 'Reference',
    module: ({ rawName }) => rawName === 'fastify-background-tasks' ? rawName : `fastify-background-tasks/${rawName}`
  },
  groupOrder: ['Functions', '*'],
  sort: ['kind', 'source-order'],
  kindSortOrder: ['Function', 'Variable', 'Reference', 'Class', 'Interface', 'TypeAlias'],
  // What would change with a clone, a commit or a version.
  disableSources: true,
  disableGit: true,
  hideGenerator: true,
  githubPages: false,
  excludeInternal: true,
  excludePrivate: true,
  excludeExternals: true,
  hidePageHeader: true,
  hideBreadcrumbs: true,
  useCodeBlocks: true,
  expandObjects: true,
  expandParameters: true,
  // Types of which only the result matters, and prose tells that; and two that only the core calls.
  intentionallyNotExported: ['Signatures', 'InferInput', 'InferOutput', 'EnqueueArgs', 'StandardResult'],
  requiredToBeDocumented: ['Variable', 'Function', 'Class', 'Interface', 'TypeAlias'],
  // Overloads, of which the first one tells, and functions that are told of where they are passed.
  intentionallyNotDocumented: [
    ...['TaskAdder', 'BackgroundTasks', 'AppBackgroundTasks'].map(name => `fastify-background-tasks.${name}.addTask`),
    'fastify-background-tasks.TaskDefinition.retry.__type.when',
    'fastify-background-tasks.TaskDeclaration.retry.__type.when',
    'fastify-background-tasks.EnqueueOptions.tx.__type.executeSql',
    'pg-boss.PgBossDb.listen.__type.close'
  ],
  validation: { notExported: true, invalidLink: true, notDocumented: true },
  treatValidationWarningsAsErrors: true
}

/** @param {import('typedoc').Application} app */
function groupByFile (app) {
  // Behind TypeDoc's own grouping.
  app.converter.on(Converter.EVENT_RESOLVE_END, ({ project }) => {
    const main = project.children?.find(({ name }) => name === 'fastify-background-tasks')
    const groups = new Map(Object.keys(GROUPS).map(title => [title, new ReflectionGroup(title, main)]))
    for (const child of main?.children ?? []) groups.get(groupOf(project, child)).children.push(child)
    if (main !== undefined) main.groups = [...groups.values()]
  }, -10_000)
}

function groupOf (project, child) {
  const exported = child instanceof ReferenceReflection ? child.getTargetReflectionDeep() : child
  const path = project.getSymbolIdFromReflection(exported)?.fileName ?? ''
  const [group] = Object.entries(GROUPS).find(([, files]) => files.some(file => path.endsWith(`/lib/${file}.ts`))) ?? []
  if (group === undefined) throw new Error(`${child.name} is in no group: name ${path} in .ci/reference/typedoc.config.js`)
  return group
}
