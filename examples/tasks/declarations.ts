import { Type } from '@sinclair/typebox'
import { declareTask } from 'fastify-background-tasks'

/** What every process knows of the task. Only the workers load `reports.ts`, which makes the reports. */
export const makeReport = declareTask({
  name: 'make-report',
  payload: Type.Object({ title: Type.String({ minLength: 1 }), pages: Type.Integer({ minimum: 1, maximum: 100 }) }),
  timeout: 60_000,
  retry: { attempts: 3, backoff: { delay: 500 } }
})
