import type { BackgroundTask } from '../tasks/background-task.js'
import type { Runner } from '../runner/runner.js'
import type { TaskList } from '../tasks/task-list.js'

/** What keeps added tasks from running, for a test. */
export interface Recorder {
  /** A plugin is registered whose tasks are to be recorded. */
  attach: (runner: Runner) => void
  taskAdded: (list: TaskList, task: BackgroundTask) => void
  /** Whether it has recorded the task. */
  has: (task: BackgroundTask) => boolean
  /** A list is ready to run. @returns whether it is kept until it is woken again */
  keep: (list: TaskList) => boolean
  /** What is recorded will not run. */
  drop: () => void
  /** Another one takes its place. */
  detach: () => void
}

const kRecorder = Symbol('fastify-background-tasks.recorder')

/** An app, and its children, whose tasks are recorded. */
interface RecordedApp {
  [kRecorder]?: Recorder | undefined
}

export function recorderOf (app: object): Recorder | undefined {
  return (app as RecordedApp)[kRecorder]
}

export function setRecorder (app: object, recorder: Recorder | undefined): void {
  (app as RecordedApp)[kRecorder] = recorder
}
