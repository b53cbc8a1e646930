/** The path of the file that a thread loads. */
export declare const BRIDGE: string
