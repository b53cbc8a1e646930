/** The code of docs/frameworks.md on NestJS. Each `@Inject()` names its provider, because not every compiler emits the types of decorated members. */
import 'reflect-metadata'
import {
  Body, Catch, Controller, Inject, Injectable, Module, Post, Req, Scope, UseGuards, UseInterceptors,
  type ArgumentsHost, type CallHandler, type CanActivate, type ExecutionContext, type MiddlewareConsumer, type NestInterceptor, type NestMiddleware,
  type NestModule, type OnApplicationShutdown, type OnModuleDestroy
} from '@nestjs/common'
import { APP_FILTER, BaseExceptionFilter, NestFactory, REQUEST } from '@nestjs/core'
import { FastifyAdapter, type NestFastifyApplication } from '@nestjs/platform-fastify'
import { Type } from '@sinclair/typebox'
import type { FastifyRequest } from 'fastify'
import { tap, type Observable } from 'rxjs'
import { addTask, requestTasks } from '../../../lib/ambient.js'
import backgroundTasks, { declareTask } from '../../../lib/index.js'
import { writeLog } from './journal.js'
import { when } from './when.js'

/** What the mailer sends by. */
const smtp = {
  isOpen: true,
  async send (text: string): Promise<void> {
    await writeLog(this.isOpen ? text : `closed: ${text}`)
  },
  async close (): Promise<void> {
    this.isOpen = false
  }
}

export const sendReceipt = declareTask({ name: 'send-receipt', payload: Type.Object({ email: Type.String() }) })

@Injectable()
export class Mailer implements OnApplicationShutdown {
  async sendReceipt (email: string): Promise<void> { await smtp.send(`a receipt for ${email}`) }

  async onApplicationShutdown (): Promise<void> { await smtp.close() }
}

@Injectable({ scope: Scope.REQUEST })
class Orders {
  @Inject(REQUEST) private readonly request!: FastifyRequest

  async place (email: string): Promise<string> {
    this.request.backgroundTasks.addTask(sendReceipt, { email })
    return '17'
  }
}

@Injectable()
class AmbientOrders {
  async place (email: string): Promise<string> {
    addTask(sendReceipt, { email })
    return '17'
  }
}

@Injectable()
class ApiKeyGuard implements CanActivate {
  canActivate (context: ExecutionContext): boolean {
    const request = context.switchToHttp().getRequest<FastifyRequest>()
    if (request.headers['x-api-key'] === 'secret') return true
    request.backgroundTasks.with({ when: 'always' }).addTask(writeLog, `refused: ${request.url}\n`)
    return false
  }
}

@Injectable()
class Audit implements NestInterceptor {
  intercept (context: ExecutionContext, next: CallHandler): Observable<unknown> {
    const request = context.switchToHttp().getRequest<FastifyRequest>()
    return next.handle().pipe(tap(() => { request.backgroundTasks.addTask(writeLog, `done: ${request.url}\n`) }))
  }
}

@Catch()
class Alert extends BaseExceptionFilter {
  override catch (error: Error, host: ArgumentsHost): void {
    requestTasks()?.with({ when: 'always' }).addTask(writeLog, `failed: ${error.message}\n`)
    super.catch(error, host)
  }
}

@Injectable()
class Visits implements NestMiddleware {
  use (request: { originalUrl: string }, _response: unknown, next: () => void): void {
    addTask(writeLog, `visited: ${request.originalUrl}\n`)
    next()
  }
}

@Controller('orders')
@UseGuards(ApiKeyGuard)
@UseInterceptors(Audit)
class OrdersController {
  @Inject(Orders) private readonly orders!: Orders
  @Inject(AmbientOrders) private readonly ambientOrders!: AmbientOrders

  @Post()
  async place (@Body() { email }: { email: string }, @Req() request: FastifyRequest): Promise<{ id: string }> {
    request.backgroundTasks.addTask(writeLog, `ordered by ${email}\n`)
    return { id: await this.orders.place(email) }
  }

  @Post('ambient')
  async placeAmbient (@Body() { email }: { email: string }): Promise<{ id: string }> {
    addTask(writeLog, `ordered by ${email}\n`)
    if (email === '') throw new Error('nobody orders')
    return { id: await this.ambientOrders.place(email) }
  }
}

/** Notes when Nest calls its hooks. */
@Injectable()
class ShutdownHooks implements OnModuleDestroy, OnApplicationShutdown {
  async onModuleDestroy (): Promise<void> { await writeLog('onModuleDestroy') }
  async beforeApplicationShutdown (): Promise<void> { await writeLog('beforeApplicationShutdown') }
  async onApplicationShutdown (): Promise<void> { await writeLog('onApplicationShutdown') }
}

@Module({ controllers: [OrdersController], providers: [Orders, AmbientOrders, Mailer, ShutdownHooks, { provide: APP_FILTER, useClass: Alert }] })
export class AppModule implements NestModule {
  configure (consumer: MiddlewareConsumer): void {
    consumer.apply(Visits).forRoutes('*path')
  }
}

/** main.ts. It listens on the port that the environment names. */
export async function main (): Promise<NestFastifyApplication> {
  const adapter = new FastifyAdapter()
  await adapter.getInstance().register(backgroundTasks, {
    ambient: true,
    when,
    tasks: [sendReceipt.handledBy(async ({ email }) => { await app.get(Mailer).sendReceipt(email) })]
  })
  const app = await NestFactory.create<NestFastifyApplication>(AppModule, adapter)
  app.enableShutdownHooks()
  await app.listen(process.env['PORT'] ?? 3000)
  return app
}
