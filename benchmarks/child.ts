import { fork, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'

/**
 * A process of its own, as plain JavaScript: neither the load nor tsx is in its figures. It says one thing when it is
 * ready, and answers each question with one message.
 */
export class Child<Ready> {
  readonly ready: Ready
  readonly #process: ChildProcess

  private constructor (process: ChildProcess, ready: Ready) {
    this.#process = process
    this.ready = ready
  }

  /**
   * @param file a script of the folder processes, for Node, or for Debian's Python
   * @param environment more variables of the environment
   */
  static async start<Ready> (file: string, args: readonly string[], nodeOptions: readonly string[] = [], environment: NodeJS.ProcessEnv = {}): Promise<Child<Ready>> {
    const path = fileURLToPath(new URL(`processes/${file}`, import.meta.url))
    const python = file.endsWith('.py') ? { execPath: '/usr/bin/python3' } : {}
    const process = fork(path, args, { ...python, execArgv: [...nodeOptions], env: { ...globalThis.process.env, NODE_ENV: 'production', ...environment } })
    return new Child(process, await nextMessage(process) as Ready)
  }

  async ask (question: string): Promise<unknown> {
    const answer = nextMessage(this.#process)
    this.#process.send(question)
    return await answer
  }

  async stop (): Promise<void> {
    const exit = once(this.#process, 'exit')
    this.#process.kill('SIGKILL')
    await exit
  }
}

function nextMessage (child: ChildProcess): Promise<unknown> {
  return new Promise((resolve, reject) => {
    const died = (code: number | null): void => { reject(new Error(`${child.spawnargs.join(' ')} ended with code ${code}`)) }
    child.once('exit', died)
    child.once('message', message => {
      child.off('exit', died)
      resolve(message)
    })
  })
}
