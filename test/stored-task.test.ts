import t from 'tap'
import type { Job } from '../lib/engines/engine.js'
import { enqueuedAtOf, headersOf, timeOf, readJobError, toDelivery, toIso, toStored, toStoredText } from '../lib/engines/stored-task.js'

const job: Job = {
  id: 'id', task: 'note', text: '{"to":"ada"}', payload: { to: 'ada' }, delayMs: 0, keyed: false, enqueuedAt: 1, headers: {}, requestId: undefined
}
const empty = { id: 'id', task: 'note', attempt: 2, headers: {}, requestId: undefined, context: undefined, enqueuedAt: undefined }

t.test('what is stored holds no part that a job does not have, and is the same as an object and as JSON', async t => {
  const headers = { traceparent: '00-"1"-2-01' }
  const jobs: Array<[part: Partial<Job>, stored: object]> = [
    [{}, {}],
    [{ headers }, { headers }],
    [{ requestId: '"r\n2"' }, { requestId: '"r\n2"' }],
    [{ headers, requestId: 'r-1' }, { headers, requestId: 'r-1' }],
    [{ context: '{"a":"\\u0000"}' }, { context: '{"a":"\\u0000"}' }],
    [{ requestId: '' }, {}],
    [{ requestId: 7 as unknown as string }, { requestId: '7' }]
  ]
  for (const [part, stored] of jobs) {
    t.strictSame(toStored({ ...job, ...part }), { payload: { to: 'ada' }, ...stored })
    t.strictSame(JSON.parse(toStoredText({ ...job, ...part })), { payload: { to: 'ada' }, ...stored })
  }
})

t.test('each part of what was stored is read by itself, whoever wrote it', async t => {
  const found: Array<[data: unknown, read: object]> = [
    [{ payload: 'by hand' }, { payload: 'by hand' }],
    [{ payload: 1, headers: { a: 'b', n: 7, none: null }, requestId: 7, enqueuedAt: 5 }, { payload: 1, headers: { a: 'b' }, requestId: '7', enqueuedAt: 5 }],
    [{ payload: 1, context: '1' }, { payload: 1, context: '1' }],
    [{ payload: 1, headers: 'none', requestId: {}, enqueuedAt: 'never', context: {} }, { payload: 1 }],
    [{ payload: 1, headers: ['a'], requestId: '', enqueuedAt: 1e300 }, { payload: 1 }],
    [{ to: 'ada' }, { payload: { to: 'ada' } }],
    [[1], { payload: [1] }],
    [null, { payload: null }],
    [7, { payload: 7 }]
  ]
  for (const [data, read] of found) {
    const delivery = toDelivery('note', 'id', 2, data)
    t.strictSame(delivery, { ...empty, ...read })
    t.equal(enqueuedAtOf(data), delivery.enqueuedAt)
  }
  t.equal(toDelivery('note', 'id', 2, { payload: 1, enqueuedAt: 5 }, 6).enqueuedAt, 6, 'the library knows better')
  t.equal(toDelivery('note', 'id', 2, 'text', 6).enqueuedAt, 6)
  t.strictSame(headersOf(JSON.parse('{"__proto__":"a","own":"b"}'), name => name === 'own'), JSON.parse('{"__proto__":"a"}'))
})

t.test('a time that no Date can hold is no time', async t => {
  t.strictSame([0, 8.64e15, 8.64e15 + 1, NaN, Infinity, '7'].map(timeOf), [0, 8.64e15, undefined, undefined, undefined, undefined])
  t.strictSame([0, '2026-01-01', new Date(1)].map(toIso), ['1970-01-01T00:00:00.000Z', '2026-01-01T00:00:00.000Z', '1970-01-01T00:00:00.001Z'])
  t.strictSame([null, undefined, 'never', NaN].map(toIso), [undefined, undefined, undefined, undefined])
})

t.test('an error that another program stored has a name and a message all the same', async t => {
  t.strictSame(readJobError({ name: 'RangeError', message: 'no', code: 'E_NO', stack: 'secret' }, 'lost'), { name: 'RangeError', message: 'no', code: 'E_NO' })
  t.strictSame(readJobError({ code: 7 }, 'lost'), { name: 'Error', message: 'lost' })
  t.strictSame(readJobError('a stack', 'lost'), { name: 'Error', message: 'lost' })
})
