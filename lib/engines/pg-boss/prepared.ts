import { createHash } from 'node:crypto'
import type { Db } from 'pg-boss'

/** SQLSTATE: a statement of this name does not exist, or exists already. A pooler gives each transaction another connection (PgBouncer before 1.21). */
const LOST_NAME = ['26000', '42P05']

/**
 * Statements whose plan the server keeps for each connection. Planning an insert takes as long as inserting ten jobs, and planning a
 * settlement as long as settling 100. pg keeps the plan of a statement that has a name, and pg-boss hands on to pg whatever it is given as
 * the text.
 */
export class PreparedStatements implements Db {
  readonly #db: () => Db
  #keepsNames = true

  constructor (db: () => Db) {
    this.#db = db
  }

  async executeSql (text: string, values?: unknown[]): Promise<{ rows: unknown[] }> {
    if (!this.#keepsNames) return await this.#db().executeSql(text, values)
    try {
      const name = createHash('sha1').update(text).digest('hex')
      return await this.#db().executeSql({ name, text } as unknown as string, values)
    } catch (error) {
      // A TypeError means that this pg-boss does not hand its text on as it is.
      if (!(error instanceof TypeError) && !LOST_NAME.includes((error as { code?: string }).code ?? '')) throw error
      this.#keepsNames = false
      return await this.#db().executeSql(text, values)
    }
  }
}
