import type { FastifyInstance } from 'fastify'

/**
 * An app, and its encapsulated plugins that were loaded before. Those have taken their copies of its hooks already, so a new hook has to be
 * added to each of them. This symbol is the only way to them. If a later Fastify drops it, only the app itself is found.
 */
export function instancesOf (app: FastifyInstance): FastifyInstance[] {
  const children = Object.getOwnPropertySymbols(app)
    .filter(symbol => symbol.description === 'fastify.children')
    .flatMap(symbol => Reflect.get(app, symbol) as FastifyInstance[])
  return [app, ...children.flatMap(instancesOf)]
}
