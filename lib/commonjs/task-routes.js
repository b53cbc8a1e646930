'use strict'

// What `import` and `require` of the subpath `routes` both load: the plugin function itself. See plugin.js.
const routes = require('./routes.js')

module.exports = routes.default
module.exports.default = routes.default
module.exports.taskRoutes = routes.taskRoutes
