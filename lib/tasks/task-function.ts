/** The types of a task's function and of its arguments. */

/** A function that can be a task: synchronous, or returning a promise. */
export type TaskFunction<Args extends unknown[] = never[]> = (...args: Args) => unknown

/** `F` if it has several signatures, else `never`. The arguments of a function with one signature are inferred from `TaskFunction`. */
export type OverloadedFunction<F> = Signatures<F> extends [infer First, ...unknown[], infer Last]
  ? [First, Last] extends [Last, First] ? never : F
  : never

/** The arguments of an overloaded function: those of any of its last eight signatures. */
export type OverloadedArgs<F> = Signatures<F>[number]

/** TypeScript matches signatures from the last to the first, and repeats the first where a function has fewer. */
type Signatures<F> = F extends {
  (...args: infer A extends unknown[]): unknown
  (...args: infer B extends unknown[]): unknown
  (...args: infer C extends unknown[]): unknown
  (...args: infer D extends unknown[]): unknown
  (...args: infer E extends unknown[]): unknown
  (...args: infer G extends unknown[]): unknown
  (...args: infer H extends unknown[]): unknown
  (...args: infer I extends unknown[]): unknown
}
  ? [A, B, C, D, E, G, H, I]
  : never
