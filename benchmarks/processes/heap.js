// @ts-check
/**
 * What a pending task with one argument holds in memory: says the bytes for one task, and what they are for, by the
 * fields of `BackgroundTask` in a heap snapshot. Run with `--expose-gc`.
 */
import { getHeapSnapshot } from 'node:v8'
import Fastify from 'fastify'
import backgroundTasks from 'fastify-background-tasks'

const TASKS = 100_000

function task (_argument) {}

const app = Fastify()
await app.register(backgroundTasks)

async function heapUsed () {
  for (let i = 0; i < 4; i++) {
    globalThis.gc()
    await new Promise(resolve => { setTimeout(resolve, 10) })
  }
  return process.memoryUsage().heapUsed
}

/** Measures while the handler has not replied: its tasks are pending. */
let measuring
app.get('/', async request => {
  const before = await heapUsed()
  // An object for each: what the argument itself takes is the app's own, and the same one does for all.
  const argument = {}
  for (let i = 0; i < TASKS; i++) request.backgroundTasks.addTask(task, argument)
  measuring((await heapUsed() - before) / TASKS)
  const fields = await fieldsOf(getHeapSnapshot())
  process.send({ bytes: await measured, fields })
})
const measured = new Promise(resolve => { measuring = resolve })

/** Bytes for one task of what each path from a task leads to, if every task has its own of it. */
async function fieldsOf (stream) {
  let text = ''
  for await (const chunk of stream) text += chunk
  const { snapshot: { meta }, nodes, edges, strings } = JSON.parse(text)
  const nodeSize = meta.node_fields.length
  const edgeSize = meta.edge_fields.length
  const nodeAt = name => meta.node_fields.indexOf(name)
  const edgeTypes = meta.edge_types[0]
  const firstEdge = new Map()
  for (let node = 0, edge = 0; node < nodes.length; node += nodeSize) {
    firstEdge.set(node, edge)
    edge += nodes[node + nodeAt('edge_count')] * edgeSize
  }

  const fields = {}
  /** @param found the nodes that one path leads to, from all tasks */
  function follow (path, found) {
    const own = new Set(found)
    if (own.size < TASKS / 2) return
    let bytes = 0
    const next = new Map()
    for (const node of own) {
      bytes += nodes[node + nodeAt('self_size')]
      const first = firstEdge.get(node)
      for (let edge = first; edge < first + nodes[node + nodeAt('edge_count')] * edgeSize; edge += edgeSize) {
        const type = edgeTypes[edges[edge]]
        if (type === 'weak' || type === 'shortcut') continue
        const named = type !== 'element' && type !== 'hidden'
        const name = named ? strings[edges[edge + 1]] : String(edges[edge + 1])
        const step = `${path}.${name}`
        if (!next.has(step)) next.set(step, [])
        next.get(step).push(edges[edge + 2])
      }
    }
    fields[path] = bytes / TASKS
    for (const [step, targets] of next) {
      const fresh = targets.filter(target => !seen.has(target))
      for (const target of fresh) seen.add(target)
      follow(step, fresh)
    }
  }

  const tasks = []
  for (let node = 0; node < nodes.length; node += nodeSize) {
    if (strings[nodes[node + nodeAt('name')]] === 'BackgroundTask' && meta.node_types[0][nodes[node]] === 'object' &&
      nodes[node + nodeAt('self_size')] > 40) tasks.push(node)
  }
  const seen = new Set(tasks)
  follow('task', tasks)
  return fields
}

await app.inject('/')
