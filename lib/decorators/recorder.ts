import type { AddListener, Intake } from './intake.js'

/** Keeps added tasks from running, for a test. */
export interface Recorder extends AddListener {
  /** A plugin is registered whose tasks are to be recorded. */
  attach: (intake: Intake) => void
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
