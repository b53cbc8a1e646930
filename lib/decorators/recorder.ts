import type { AddListener, Intake } from './intake.js'

/** Keeps added tasks from running, for a test. */
export interface Recorder extends AddListener {
  /** Records the tasks of one registration of the plugin from now on. */
  attach: (intake: Intake) => void
}

const kRecorder = Symbol('fastify-background-tasks.recorder')

/** An app whose tasks are recorded. Its children inherit the slot. */
interface RecordedApp {
  [kRecorder]?: Recorder | undefined
}

export function recorderOf (app: object): Recorder | undefined {
  return (app as RecordedApp)[kRecorder]
}

export function setRecorder (app: object, recorder: Recorder | undefined): void {
  (app as RecordedApp)[kRecorder] = recorder
}
