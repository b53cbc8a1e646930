import { taskRoutes as plugin, type TaskRoutesOptions as Options } from './routes.js'

declare function taskRoutes (...args: Parameters<typeof plugin>): ReturnType<typeof plugin>

declare namespace taskRoutes {
  export {
    plugin as default,
    plugin as taskRoutes,
    Options as TaskRoutesOptions
  }
}

export = taskRoutes
