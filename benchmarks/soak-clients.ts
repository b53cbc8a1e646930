import { Agent, request } from 'node:http'
import http2 from 'node:http2'
import { connect } from 'node:net'
import { setTimeout as sleep } from 'node:timers/promises'

const PATHS = ['/now', '/wait', '/fails', '/handled', '/on-send', '/stream', '/hijacked', '/late', '/timeout', '/middleware', '/nowhere']
const BODY = JSON.stringify({ some: 'x'.repeat(2_000) })
/** Longer than any reply takes: a connection that hangs is seen in the counts. */
const PATIENCE_MS = 15_000

export interface Counts {
  requests: number
  replied: number
  hungUp: number
  /** Not sent, or without a whole reply: the server was down. */
  lost: number
  hanging: number
  /** Clients that have a connection now. */
  busy: number
}

/** One client: connections one after another, until `signal` aborts. */
export async function useServer (ports: () => readonly [number, number] | undefined, counts: Counts, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    const now = ports()
    const { lost } = counts
    if (now !== undefined) {
      counts.busy++
      await anyOf([pipeline, askInTurn, askInTurn, askTogether])(now, counts)
      counts.busy--
    }
    if (now === undefined || counts.lost > lost) await sleep(100)
  }
}

/** Requests on one keep-alive connection, each behind the reply of the one before; some are given up on the way. */
async function askInTurn ([port]: readonly [number, number], counts: Counts): Promise<void> {
  const agent = new Agent({ keepAlive: true, maxSockets: 1 })
  for (let left = 1 + Math.floor(Math.random() * 8); left > 0; left--) {
    if (!await ask(port, agent, counts)) break
  }
  agent.destroy()
}

/** @returns whether the connection can be used on */
function ask (port: number, agent: Agent, counts: Counts): Promise<boolean> {
  return new Promise(resolve => {
    const isPost = Math.random() < 0.3
    const hangsUp = Math.random() < 0.2
    const outgoing = request({
      port,
      host: '127.0.0.1',
      agent,
      path: isPost ? '/body' : anyPath(),
      method: isPost ? 'POST' : 'GET',
      headers: isPost ? { 'content-type': 'application/json', 'content-length': BODY.length } : {}
    })
    let ended = false
    const end = (how: 'replied' | 'hungUp' | 'lost' | 'hanging'): void => {
      if (ended) return
      ended = true
      counts[how]++
      clearTimeout(timer)
      if (how !== 'replied') outgoing.destroy()
      resolve(how === 'replied')
    }
    const timer = hangsUp
      ? setTimeout(end, Math.random() * 30, 'hungUp')
      : setTimeout(end, PATIENCE_MS, 'hanging')
    outgoing.on('error', () => { end('lost') })
    outgoing.on('response', incoming => {
      incoming.resume().on('end', () => { end('replied') }).on('error', () => { end('lost') })
    })
    counts.requests++
    // Some hang up in the middle of their body.
    outgoing.write(isPost ? BODY.slice(0, 500) : '')
    if (!isPost || !hangsUp || Math.random() < 0.7) outgoing.end(isPost ? BODY.slice(500) : undefined)
  })
}

/** Several requests at once on one connection; half of the clients hang up at some moment. */
async function pipeline ([port]: readonly [number, number], counts: Counts): Promise<void> {
  const requests = 1 + Math.floor(Math.random() * 6)
  const socket = connect({ port, host: '127.0.0.1' })
  let end: 'replied' | 'hungUp' | 'lost' | 'hanging' = 'replied'
  socket.on('error', () => { end = 'lost' })
  const stop = (how: typeof end): void => {
    end = how
    if (Math.random() < 0.5) socket.destroy()
    else socket.resetAndDestroy()
  }
  const timer = Math.random() < 0.5
    ? setTimeout(stop, Math.random() * 40, 'hungUp')
    : setTimeout(stop, PATIENCE_MS, 'hanging')
  for (let i = 1; i <= requests; i++) {
    const connection = i === requests ? 'close' : 'keep-alive'
    socket.write(`GET ${anyPath()} HTTP/1.1\r\nHost: localhost\r\nConnection: ${connection}\r\n\r\n`)
  }
  counts.requests += requests
  socket.resume()
  await new Promise(resolve => { socket.on('close', resolve) })
  clearTimeout(timer)
  counts[end] += requests
}

/** Several streams of one HTTP/2 session; some are closed on the way, with an error code or without, or the whole session is. */
async function askTogether ([, port]: readonly [number, number], counts: Counts): Promise<void> {
  const session = http2.connect(`http://127.0.0.1:${port}`)
  let broken = false
  session.on('error', () => { broken = true })
  const streams = Array.from({ length: 1 + Math.floor(Math.random() * 6) }, () => session.request({ ':path': anyPath() }))
  counts.requests += streams.length
  const hangsUp = Math.random() < 0.1
  if (hangsUp) setTimeout(() => { session.destroy() }, Math.random() * 30)
  await Promise.all(streams.map(async stream => {
    let end: 'replied' | 'hungUp' | 'lost' | 'hanging' = 'replied'
    stream.on('error', () => { end = 'lost' }).resume()
    const stop = (how: typeof end, code: number): void => {
      end = how
      stream.close(code)
    }
    const { NGHTTP2_CANCEL } = http2.constants
    const timer = Math.random() < 0.2
      ? setTimeout(stop, Math.random() * 30, 'hungUp', NGHTTP2_CANCEL)
      : setTimeout(stop, PATIENCE_MS, 'hanging', NGHTTP2_CANCEL)
    await new Promise(resolve => { stream.on('close', resolve) })
    clearTimeout(timer)
    counts[hangsUp ? 'hungUp' : broken ? 'lost' : end]++
  }))
  session.destroy()
}

function anyPath (): string {
  return anyOf(PATHS)
}

function anyOf<T> (all: readonly T[]): T {
  return all[Math.floor(Math.random() * all.length)] as T
}
