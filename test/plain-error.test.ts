import t from 'tap'
import { plainError } from '../lib/engines/plain-error.js'

t.test('an error of a library is passed on with its message and its code, and with nothing else', async t => {
  const error = Object.assign(new Error('refused'), { code: 'E_NO', command: { args: ['secret'] }, detail: 'secret' })
  const plain = plainError(error)
  t.equal(plain.message, 'refused')
  t.strictSame(Object.entries(plain), [['code', 'E_NO']])
  t.strictSame(Object.entries(plainError(Object.assign(new Error('refused'), { code: 406 }))), [], 'a code is a text')
})

t.test('an error without a message is told by the first error that it holds, by its code, or as it is', async t => {
  const first = new Error('connect ECONNREFUSED ::1:6379')
  t.equal(plainError(Object.assign(new AggregateError([first]), { code: 'ECONNREFUSED' })).message, first.message)
  t.equal(plainError(Object.assign(new AggregateError([undefined]), { code: 'ECONNREFUSED' })).message, 'ECONNREFUSED')
  t.equal(plainError('gone').message, 'gone')
  t.equal(plainError(undefined).message, 'undefined')
  t.equal(plainError(null, 'said otherwise').message, 'said otherwise')
})

t.test('an error that cannot be read is still an error with a message', async t => {
  const hostile = { get message (): string { throw new Error('no') }, get code (): string { throw new Error('no') } }
  t.equal(plainError(hostile).message, 'an error that cannot be read')
  t.equal(plainError(Object.create(null)).message, 'an error that cannot be read')
  t.strictSame(Object.entries(plainError(hostile, 'said otherwise')), [])
})
