import { randomUUID } from 'node:crypto'
import { connect, type Channel, type ChannelModel } from 'amqplib'
import type { Test } from 'tap'
import { rabbitmq, type RabbitMqOptions } from '../../lib/engines/rabbitmq/index.js'
import type { TaskEngine } from '../../lib/index.js'
import { opened } from './opened.js'

export interface OpenRabbitMq {
  readonly url: string
  /** Of the test's own: its queues are gone behind it. */
  readonly prefix: string
  readonly connection: ChannelModel
  readonly channel: Channel
  engine: (options?: RabbitMqOptions) => TaskEngine
}

/** The RabbitMQ of the machine, or of `RABBITMQ_URL`. */
export async function openRabbitMq (t: Test): Promise<OpenRabbitMq | undefined> {
  const url = process.env['RABBITMQ_URL'] ?? 'amqp://guest:guest@127.0.0.1:5672'
  const connection = await opened(t, 'RabbitMQ', async () => await connect(url, { timeout: 2_000 }))
  if (connection === undefined) return undefined
  connection.on('error', () => {})
  const channel = await connection.createChannel()
  const prefix = `fbt-test-${randomUUID().slice(0, 8)}`
  const names = new Set<string>()
  t.teardown(async () => {
    for (const name of names) await Promise.all([channel.deleteQueue(`${prefix}.${name}`), channel.deleteQueue(`${prefix}.${name}.dead`)])
    // To delete what is not there is no error.
    await Promise.all(waitsOf(prefix).flatMap(name => [channel.deleteQueue(name), channel.deleteExchange(name)]))
    await connection.close()
  })
  return {
    url,
    prefix,
    connection,
    channel,
    engine (options) {
      const engine = rabbitmq({ url, prefix, ...options })
      const start = engine.start.bind(engine)
      engine.start = async (tasks, events) => {
        for (const { name } of tasks) names.add(name)
        await start(tasks, events)
      }
      return engine
    }
  }
}

export function waitsOf (prefix: string): string[] {
  return Array.from({ length: 27 * 8 }, (_, i) => `${prefix}:wait:${Math.ceil(125 * 2 ** (Math.floor(i / 8) - 6) * (8 + i % 8))}`)
}
