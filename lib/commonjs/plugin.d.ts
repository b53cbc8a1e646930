import {
  backgroundTasks as plugin,
  BackgroundTask as Task,
  type AddedArgs as TaskArgs,
  type AddedTask as TaskOrFn,
  type AppBackgroundTasks as AppTasks,
  type BackgroundTasks as Tasks,
  type ExchangeOutcome as Outcome,
  type FastifyBackgroundTasksOptions as Options,
  type IdleOptions as IdleOpts,
  type OverloadedArgs as OverArgs,
  type OverloadedFunction as OverFn,
  type TaskAbandonedMessage as AbandonedMessage,
  type TaskAddedMessage as AddedMessage,
  type TaskAdder as Adder,
  type TaskCondition as Condition,
  type TaskFunction as Fn,
  type TaskOptions as TaskOpts,
  type TaskRunMessage as RunMessage,
  type TaskSkippedMessage as SkippedMessage,
  type TaskState as State,
  type TaskStats as Stats
} from './index.js'

declare function backgroundTasks (...args: Parameters<typeof plugin>): ReturnType<typeof plugin>

declare namespace backgroundTasks {
  export {
    plugin as default,
    plugin as backgroundTasks,
    plugin as fastifyBackgroundTasks,
    Task as BackgroundTask,
    TaskArgs as AddedArgs,
    TaskOrFn as AddedTask,
    AppTasks as AppBackgroundTasks,
    Tasks as BackgroundTasks,
    Outcome as ExchangeOutcome,
    Options as FastifyBackgroundTasksOptions,
    IdleOpts as IdleOptions,
    OverArgs as OverloadedArgs,
    OverFn as OverloadedFunction,
    AbandonedMessage as TaskAbandonedMessage,
    AddedMessage as TaskAddedMessage,
    Adder as TaskAdder,
    Condition as TaskCondition,
    Fn as TaskFunction,
    TaskOpts as TaskOptions,
    RunMessage as TaskRunMessage,
    SkippedMessage as TaskSkippedMessage,
    State as TaskState,
    Stats as TaskStats
  }
}

export = backgroundTasks
