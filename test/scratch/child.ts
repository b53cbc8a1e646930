import { spawn } from 'node:child_process'
const child = spawn(process.execPath, ['--import', 'tsx', 'test/support/nest-service.ts'], { stdio: ['ignore', 'inherit', 'inherit', 'ipc'], env: { ...process.env, PORT: '0', REGISTRATION: 'page' } })
child.on('exit', (...a) => console.log('exit', a))
child.on('message', async (m: any) => { console.log(Date.now() % 100000, m); if (m.address) { 
 if (process.argv[3]) { const r = await fetch(m.address + '/orders', { method: 'POST', headers: { 'x-api-key': 'no', 'content-type': 'application/json' }, body: '{}' }); await r.text(); console.log(r.status) }
 child.send('add'); if (process.argv[2] === 'SIGTERM') child.kill('SIGTERM'); else child.send(process.argv[2]); setTimeout(() => child.send('go on'), 300) } })
setTimeout(() => { child.kill('SIGKILL') }, 6000).unref()
