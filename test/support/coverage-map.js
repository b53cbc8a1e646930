import { readdirSync } from 'node:fs'

/**
 * Every file of lib has to be covered completely, save the adapters: what they do when a server goes away is tested in processes
 * that are killed (test/conformance), and those leave no coverage behind.
 */
const files = readdirSync('lib', { recursive: true, encoding: 'utf8' })
  .filter(name => name.endsWith('.ts') && !name.endsWith('.d.ts') && !/^engines\/(bullmq|pg-boss|rabbitmq)/.test(name))
  .map(name => `lib/${name}`)

export default () => files
