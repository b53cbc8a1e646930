import 'reflect-metadata'
import { Catch, Controller, Get, HttpException, Injectable, Module, Req, Res, Sse, type ArgumentsHost, type ExceptionFilter, type MiddlewareConsumer, type NestMiddleware, type NestModule, type OnModuleDestroy, type BeforeApplicationShutdown, type OnApplicationShutdown, Inject, Global, UseFilters, UseGuards, UseInterceptors, UsePipes, ParseIntPipe, Query } from '@nestjs/common'
import { NestFactory, HttpAdapterHost } from '@nestjs/core'
import { FastifyAdapter, type NestFastifyApplication } from '@nestjs/platform-fastify'
import type { FastifyRequest, FastifyReply } from 'fastify'
import { interval, map, take, timer } from 'rxjs'
import backgroundTasks from '../../lib/index.js'
import { addTask, requestTasks } from '../../lib/ambient.js'
import { setTimeout as sleep } from 'node:timers/promises'
const log: string[] = []
const note = (s: string) => { log.push(s); }
const found = (where: string) => note(where + ' ' + (requestTasks() !== undefined))
@Injectable() class MW implements NestMiddleware { use (req: any, _res: any, next: () => void) { found('middleware'); note('mw plain ' + ('backgroundTasks' in req) + ' ' + req.constructor.name); if (req.originalUrl === '/mwends') { _res.end('x'); return }  next() } }
@Injectable() class P implements OnModuleDestroy, BeforeApplicationShutdown, OnApplicationShutdown {
  onModuleDestroy () { note('onModuleDestroy') }
  async beforeApplicationShutdown () { note('beforeApplicationShutdown') }
  onApplicationShutdown () { note('onApplicationShutdown') }
}
@Catch() class F implements ExceptionFilter { catch (e: any, host: ArgumentsHost) { found('filter'); 
  const r = host.switchToHttp().getRequest<FastifyRequest>(); r.backgroundTasks.with({when: 'always', name: 'ofFilter'}).addTask(() => { note('filter task ' + JSON.stringify(r.backgroundTasks.outcome)) })
  addTask(() => note('filter default task'))
  host.switchToHttp().getResponse<FastifyReply>().code(418).send({ no: e.message }) } }
@Injectable() class G { canActivate () { found('guard'); return true } }
@Injectable() class I { intercept (_: any, next: any) { found('interceptor'); return next.handle().pipe(map(v => { found('after'); return v })) } }
@Controller() @UseGuards(G) @UseInterceptors(I)
class C {
  @Inject(HttpAdapterHost) host!: HttpAdapterHost
  @Get('ok') ok () { found('handler'); addTask(() => { found('task') }); return 'ok' }
  @Get('boom') boom (@Req() r: FastifyRequest) { r.backgroundTasks.addTask(() => note('success task')); r.backgroundTasks.with({ when: 'always' }).addTask(() => note('outcome ' + JSON.stringify(r.backgroundTasks.outcome))); throw new HttpException('no', 409) }
  @Get('filtered') @UseFilters(F) filtered () { throw new Error('x') }
  @Get('pipe') pipe (@Query('n', ParseIntPipe) n: number) { return String(n) }
  @Sse('sse') sse (@Req() r: FastifyRequest) { r.backgroundTasks.addTask(() => note('sse task ' + JSON.stringify(r.backgroundTasks.outcome))); return interval(20).pipe(take(3), map(n => { note('event'); found('event'); return { data: n } })) }
  @Get('slow') async slow (@Req() r: FastifyRequest) { r.backgroundTasks.addTask(async () => { note('task starts'); await sleep(150); note('task ends') }); return 'slow' }
  @Get('slowHandler') async sh (@Req() r: FastifyRequest) { note('handler starts'); r.backgroundTasks.addTask(async () => { note('task2 ends') }); await sleep(100); note('handler ends');  return 'slow' }
  @Get('res') async res (@Res() r: FastifyReply) { addTask(() => note('res task')); void r.send('x') }
}
@Module({ controllers: [C], providers: [P] }) class M implements NestModule { configure (c: MiddlewareConsumer) { c.apply(MW).forRoutes('*') } }
for (const early of [true, false]) {
  console.log('--- early', early)
  const adapter = new FastifyAdapter()
  if (early) await adapter.getInstance().register(backgroundTasks, { ambient: true })
  const app = await NestFactory.create<NestFastifyApplication>(M, adapter, { logger: ['error'] })
  if (!early) await app.register(backgroundTasks as any, { ambient: true })
  adapter.getInstance().addHook('onClose', async () => { note('fastify onClose') })
  await app.listen(0, '127.0.0.1')
  const url = await app.getUrl()
  for (const p of ['ok', 'boom', 'filtered', 'pipe?n=x', 'sse', 'res', 'nowhere', 'mwends']) {
    const r = await fetch(url + '/' + p); console.log(p, r.status, (await r.text()).slice(0, 80))
    await adapter.getInstance().backgroundTasks.idle(); console.log('   ', log.splice(0).join(' | '))
  }
  await (await fetch(url + '/slow')).text()
  console.log('slow done'); const sh = fetch(url + '/slowHandler', { headers: { connection: 'close' } }).then(r => r.status, e => e.message)
  await sleep(20)
  note('close()'); setTimeout(() => console.log(log), 3000).unref(); await app.close(); note('closed'); console.log(await sh, log.splice(0).join(' | '))
}
