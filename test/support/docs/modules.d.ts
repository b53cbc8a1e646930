/** Modules that the documentation imports and this repository does not install: of each as much as is used there. */

declare module '@vercel/functions' {
  export function waitUntil (promise: Promise<unknown>): void
}

declare module '@sentry/node' {
  export function captureException (error: unknown, hint?: { tags?: Record<string, string>, extra?: Record<string, unknown> }): string
}
