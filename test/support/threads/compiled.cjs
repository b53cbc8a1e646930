'use strict'
// As a compiler makes it of `export default`.
Object.defineProperty(exports, '__esModule', { value: true })
exports.default = (payload) => ({ compiled: payload })
