/**
 * The NestJS app of docs/frameworks.md, in a process of its own: the loader of the tests does not find the modules of NestJS. It is
 * registered as the page says, or with the default `when` before or after `NestFactory.create`.
 */
import { Logger, Module, type MiddlewareConsumer, type NestModule } from '@nestjs/common'
import { NestFactory } from '@nestjs/core'
import { FastifyAdapter, type NestFastifyApplication } from '@nestjs/platform-fastify'
import backgroundTasks from '../../lib/index.js'
import { journal, takeJournal, writeLog } from '../guides/frameworks/journal.js'
import { AppModule, main, sendReceipt } from '../guides/frameworks/nest.js'

/** When the plugin is registered: as on the page, or with the default `when`. */
export type Registration = 'page' | 'before create' | 'after create'

/** What the service does when it is told to. */
export type Order =
  /** Tells what was written, when all tasks have run. */
  | 'idle'
  /** Adds a task to the app that ends when it is told to go on, and then adds a receipt. */
  | 'add'
  | 'go on'
  /** `app.close()` of Nest. */
  | 'close'
  /** Closes the adapter, which is Fastify, and then Nest. */
  | 'close the adapter first'

export type Message = { address: string } | { written: string[] } | { wrote: string }

const say = (message: Message): void => { process.send?.(message) }

/** The app of the page, with a middleware that fails for one path. */
@Module({ imports: [AppModule] })
class WithFailingMiddleware implements NestModule {
  configure (consumer: MiddlewareConsumer): void {
    const fail = (_request: unknown, _response: unknown, next: (error: Error) => void): void => { next(new Error('in a middleware')) }
    consumer.apply(fail).forRoutes('failing')
  }
}

async function create (registration: Registration): Promise<NestFastifyApplication> {
  const adapter = new FastifyAdapter()
  const register = async (): Promise<void> => {
    await adapter.getInstance().register(backgroundTasks, { ambient: true, tasks: [sendReceipt.handledBy(async () => {})] })
  }
  if (registration === 'before create') await register()
  const app = await NestFactory.create<NestFastifyApplication>(WithFailingMiddleware, adapter)
  if (registration === 'after create') await register()
  await app.listen(0)
  return app
}

Logger.overrideLogger(false)
journal.push = line => {
  say({ wrote: line })
  return Array.prototype.push.call(journal, line)
}
const registration = process.env['REGISTRATION'] as Registration
const app = registration === 'page' ? await main() : await create(registration)
const tasks = app.getHttpAdapter().getInstance().backgroundTasks
let goOn = (): void => {}

const orders: Record<Order, () => Promise<void>> = {
  idle: async () => {
    await tasks.idle()
    say({ written: takeJournal() })
  },
  add: async () => {
    tasks.addTask(async () => {
      await writeLog('a task begins')
      await new Promise<void>(resolve => { goOn = resolve })
      await writeLog('a task ends')
      tasks.addTask(sendReceipt, { email: 'ada' })
    })
  },
  'go on': async () => { goOn() },
  // The channel keeps the process alive until then, as connections of a database do elsewhere.
  close: async () => {
    await app.close()
    process.disconnect()
  },
  'close the adapter first': async () => {
    await app.getHttpAdapter().close()
    await app.close()
    process.disconnect()
  }
}
process.on('message', order => { void orders[order as Order]() })
say({ address: `http://localhost:${new URL(await app.getUrl()).port}` })
