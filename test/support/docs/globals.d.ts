/**
 * What the documentation takes for granted: the blocks that do not declare these names themselves have them from here. Keep it
 * small: what one page takes for granted is declared on that page, in a comment (`<!-- ts`). Not part of any other program
 * (tsconfig.json).
 */
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify'
import type plugin from 'fastify-background-tasks'
import type {
  defineTask as define, EnqueueOptions, FastifyBackgroundTasksOptions, TaskDefinition
} from 'fastify-background-tasks'

declare global {
  const backgroundTasks: typeof plugin
  const defineTask: typeof define
  const app: FastifyInstance
  const request: FastifyRequest
  const reply: FastifyReply

  /** The reader's own. */
  const buildApp: (options?: FastifyBackgroundTasksOptions) => FastifyInstance
  const sendMail: (to: string, text?: string, options?: { signal?: AbortSignal }) => Promise<void>
  const writeLog: (line: string) => Promise<void>
  const sendEmail: TaskDefinition<{ to: string, subject: string }>
  const tasks: TaskDefinition[]
  class NoSuchMailbox extends Error {}

  /** Values for `{ name }`. */
  const to: string
  const subject: string
  const id: string
  const key: string
  const delay: number
  const tx: EnqueueOptions['tx']
  const fn: (...args: string[]) => void
  const args: string[]
  const connection: string
  const connectionString: string
  const url: string
}

declare module 'fastify' {
  interface FastifyInstance {
    readonly mailer: { send: (mail: { to: string, subject: string }, options?: { signal?: AbortSignal }) => Promise<{ messageId: string }> }
  }
}
