/** The order of the pages of `find`, for whoever sorts records by itself. */
import type { JobPosition } from './engine.js'

/** Compares two positions: the newest first, and of one time the one with the greatest id. */
export function newestFirst (a: JobPosition, b: JobPosition): number {
  if (a.enqueuedAt !== b.enqueuedAt) return b.enqueuedAt - a.enqueuedAt
  return a.id === b.id ? 0 : a.id < b.id ? 1 : -1
}

/** Whether a position comes after another one, or there is no other one. */
export function isBehind (position: JobPosition, other: JobPosition | undefined): boolean {
  return other === undefined || newestFirst(other, position) < 0
}
