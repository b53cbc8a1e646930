import { main } from '../guides/frameworks/nest.js'
import { takeJournal } from '../guides/frameworks/journal.js'
process.env['PORT'] = '0'
const app = await main()
const url = await app.getUrl()
  for (const [path, key, email] of [['/orders', 'secret', 'ada'], ['/orders', 'no', 'ada'], ['/orders/ambient', 'secret', 'ada'],['/orders/ambient', 'secret', '']] as const) {
    const reply = await fetch(url + path, { method: 'POST', headers: { 'x-api-key': key, 'content-type': 'application/json' }, body: JSON.stringify({ email }) })
    console.log(reply.status, await reply.text())
    await app.getHttpAdapter().getInstance().backgroundTasks.idle()
    console.log(takeJournal())
  }
await app.getHttpAdapter().close()
await app.close()
console.log(takeJournal())
