import type { FastifyInstance } from 'fastify'

/**
 * An app and its encapsulated plugins that were loaded before: those took their copies of its hooks already, so that a
 * hook has to be added to each. Fastify offers no way to them but this symbol; should it go, only the app is found.
 */
export function instancesOf (app: FastifyInstance): FastifyInstance[] {
  const children = Object.getOwnPropertySymbols(app)
    .filter(symbol => symbol.description === 'fastify.children')
    .flatMap(symbol => Reflect.get(app, symbol) as FastifyInstance[])
  return [app, ...children.flatMap(instancesOf)]
}
