import 'reflect-metadata'
import { NestFactory } from '@nestjs/core'
import { FastifyAdapter, type NestFastifyApplication } from '@nestjs/platform-fastify'
import { AppModule, Mailer, sendReceipt } from '../guides/frameworks/nest.js'
import { takeJournal } from '../guides/frameworks/journal.js'
import backgroundTasks from '../../lib/index.js'
import { StubEngine } from '../support/stub-engine.js'
const engine = new StubEngine()
const adapter = new FastifyAdapter()
await adapter.getInstance().register(backgroundTasks, { engine, tasks: [sendReceipt.handledBy(async ({ email }) => { await app.get(Mailer).sendReceipt(email) })] })
const app = await NestFactory.create<NestFastifyApplication>(AppModule, adapter, { logger: false })
await app.init(); await adapter.getInstance().ready()
console.log(await engine.deliver({ task: 'send-receipt', payload: { email: 'ada' } } as any), takeJournal())
await app.close(); console.log(takeJournal())
