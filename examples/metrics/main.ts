/**
 * Starts the shop: PORT (3000), HOST (127.0.0.1). Order something, and see what has become of the tasks:
 *
 *     curl -X POST http://127.0.0.1:3000/orders
 *     curl -X DELETE http://127.0.0.1:3000/orders/1
 *     curl http://127.0.0.1:3000/metrics
 */
import closeWithGrace from 'close-with-grace'
import { buildApp } from './app.js'

const { PORT = '3000', HOST = '127.0.0.1', LOG_LEVEL = 'info' } = process.env
const app = await buildApp({ level: LOG_LEVEL })
closeWithGrace(async () => { await app.close() })
console.log(`listening on ${await app.listen({ port: Number(PORT), host: HOST })}`)
