import basicAuth from '@fastify/basic-auth'
import type { FastifyInstance } from 'fastify'

export interface Login { name: string, password: string }

/** Gives an encapsulated plugin `basicAuth`, the hook that asks for a login. */
export async function addLogin (app: FastifyInstance, realm: string, login: Login): Promise<void> {
  await app.register(basicAuth, {
    authenticate: { realm },
    async validate (name, password) {
      if (name !== login.name || password !== login.password) throw new Error('wrong name or password')
    }
  })
}
