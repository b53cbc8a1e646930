'use strict'

// What `import` and `require` both load, so that there is one plugin and one copy of its symbols: the plugin function
// itself, with every export as a property. Written out, for Node finds the named exports by reading this text.
const index = require('./index.js')

module.exports = index.default
module.exports.default = index.default
module.exports.backgroundTasks = index.backgroundTasks
module.exports.fastifyBackgroundTasks = index.fastifyBackgroundTasks
module.exports.BackgroundTask = index.BackgroundTask
module.exports.declareTask = index.declareTask
module.exports.defineTask = index.defineTask
