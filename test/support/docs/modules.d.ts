/** Modules that the documentation imports and this repository does not install: of each as much as is used there. */

declare module 'piscina' {
  export class Piscina {
    constructor (options: { filename: string })
    run (task: unknown, options?: { signal?: AbortSignal }): Promise<unknown>
    close (): Promise<void>
  }
}

declare module '@vercel/functions' {
  export function waitUntil (promise: Promise<unknown>): void
}

declare module '@sentry/node' {
  export function captureException (error: unknown, hint?: { tags?: Record<string, string>, extra?: Record<string, unknown> }): string
}
