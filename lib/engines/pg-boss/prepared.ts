import { createHash } from 'node:crypto'
import type { Db } from 'pg-boss'

/** A statement of that name is not there, or was there already: a pooler gives each transaction another connection (PgBouncer before 1.21). */
const LOST_NAME = ['26000', '42P05']

/**
 * Statements whose plan the server keeps, for each connection: to plan an insert takes it as long as to insert ten jobs, and to
 * plan a settlement as long as to settle 100. To pg, which is given what pg-boss is given as a text, a statement with a name is such a one.
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
      // A TypeError: pg-boss makes something else of a text than to hand it on.
      if (!(error instanceof TypeError) && !LOST_NAME.includes((error as { code?: string }).code ?? '')) throw error
      this.#keepsNames = false
      return await this.#db().executeSql(text, values)
    }
  }
}
