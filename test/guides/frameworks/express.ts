/** The code of docs/frameworks.md on Express middleware. */
import type { IncomingMessage, ServerResponse } from 'node:http'
import express from '@fastify/express'
import middie from '@fastify/middie'
import Fastify, { type FastifyInstance, type FastifyRequest } from 'fastify'
import { addTask } from '../../../lib/ambient.js'
import backgroundTasks from '../../../lib/index.js'
import { writeLog } from './journal.js'

type Next = (error?: Error) => void

function visits (req: IncomingMessage, _res: ServerResponse, next: Next): void {
  addTask(writeLog, `visited: ${req.url}\n`)
  next()
}

const requests = new WeakMap<IncomingMessage, FastifyRequest>()

function orders (req: IncomingMessage, res: ServerResponse, next: Next): void {
  const tasks = requests.get(req)?.backgroundTasks
  tasks?.addTask(writeLog, 'an order has come in\n')
  if (req.headers['x-api-key'] === 'secret') res.writeHead(202).end()
  else next(new Error('who are you?'))
}

/** A server of middleware. */
export async function site (name: '@fastify/express' | '@fastify/middie'): Promise<FastifyInstance> {
  const app = Fastify()
  await app.register(backgroundTasks, { ambient: true })

  app.addHook('onRequest', async request => { requests.set(request.raw, request) })

  if (name === '@fastify/express') {
    await app.register(express)
  } else {
    await app.register(middie)
  }

  app.use(visits)
  app.use('/orders', orders)
  return app
}
