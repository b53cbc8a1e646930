export interface Row {
  readonly what: string
  /** The figure in its unit, and what there is to know about it. */
  readonly figure: string
  /** Absent where the figure is only reported. */
  readonly limit?: string
  readonly met?: boolean
}

export function printHeading (text: string): void {
  console.log(`\n${text}`)
}

const missed: string[] = []

/** What was printed as not met so far. */
export function notMet (): readonly string[] {
  return missed
}

export function printRow ({ what, figure, limit = '', met }: Row): void {
  if (met === false) missed.push(`${what}: ${figure}, limit ${limit}`)
  const verdict = met === undefined ? '' : met ? 'ok' : 'NOT MET'
  console.log(`  ${what.padEnd(58)} ${figure.padEnd(42)} ${limit.padEnd(10)} ${verdict}`.trimEnd())
}

export function median (values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = sorted.length >> 1
  // There is one at least: a median of nothing is a mistake of the caller's.
  const upper = sorted[middle] as number
  return sorted.length % 2 === 1 ? upper : (upper + (sorted[middle - 1] as number)) / 2
}

/** The slope of the line through the points that fits best. */
export function slope (points: ReadonlyArray<readonly [x: number, y: number]>): number {
  const mean = (values: number[]): number => values.reduce((sum, value) => sum + value, 0) / values.length
  const x = mean(points.map(point => point[0]))
  const y = mean(points.map(point => point[1]))
  const covariance = points.reduce((sum, point) => sum + (point[0] - x) * (point[1] - y), 0)
  return covariance / points.reduce((sum, point) => sum + (point[0] - x) ** 2, 0)
}
