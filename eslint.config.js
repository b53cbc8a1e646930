import neostandard from 'neostandard'

export default [
  ...neostandard({ ts: true, ignores: ['dist', '.tap'] }),
  // `void` marks a promise that nobody waits for, on purpose.
  { rules: { 'no-void': ['error', { allowAsStatement: true }] } }
]
