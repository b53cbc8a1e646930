import {
  backgroundTasks as plugin,
  BackgroundTask as Task,
  type AppBackgroundTasks as AppTasks,
  type BackgroundTasks as Tasks,
  type ExchangeOutcome as Outcome,
  type FastifyBackgroundTasksOptions as Options,
  type IdleOptions as IdleOpts,
  type TaskAbandonedMessage as AbandonedMessage,
  type TaskAddedMessage as AddedMessage,
  type TaskAdder as Adder,
  type TaskCondition as Condition,
  type TaskFunction as Fn,
  type TaskFunctionFor as FnFor,
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
    AppTasks as AppBackgroundTasks,
    Tasks as BackgroundTasks,
    Outcome as ExchangeOutcome,
    Options as FastifyBackgroundTasksOptions,
    IdleOpts as IdleOptions,
    AbandonedMessage as TaskAbandonedMessage,
    AddedMessage as TaskAddedMessage,
    Adder as TaskAdder,
    Condition as TaskCondition,
    Fn as TaskFunction,
    FnFor as TaskFunctionFor,
    TaskOpts as TaskOptions,
    RunMessage as TaskRunMessage,
    SkippedMessage as TaskSkippedMessage,
    State as TaskState,
    Stats as TaskStats
  }
}

export = backgroundTasks
