import { createHash } from 'node:crypto'
import type { Db } from 'pg-boss'

/** SQLSTATE: a statement of this name does not exist, or exists already. A pooler gives each transaction another connection (PgBouncer before 1.21). */
const LOST_NAME = ['26000', '42P05']

/** What pg takes in place of a text. */
interface Query {
  readonly name?: string
  readonly text: string
  readonly query_timeout: number
}

/**
 * Statements whose plan the server keeps for each connection. Planning an insert takes as long as inserting ten jobs, and planning a
 * settlement as long as settling 100. pg keeps the plan of a statement that has a name, and pg-boss hands on to pg whatever it is given as
 * the text. pg also closes the connection of a statement that takes too long, so that none stays in the pool that is lost or blocked.
 */
export class PreparedStatements implements Db {
  readonly #db: () => Db
  readonly #timeoutMs: number
  readonly #queries = new Map<string, Query>()
  #keepsNames = true
  #takesQueries = true

  /** @param timeoutMs milliseconds after which pg closes the connection of a statement */
  constructor (db: () => Db, timeoutMs: number) {
    this.#db = db
    this.#timeoutMs = timeoutMs
  }

  async executeSql (text: string, values?: unknown[]): Promise<{ rows: unknown[] }> {
    if (!this.#keepsNames) return await this.executeOnce(text, values)
    try {
      return await this.#db().executeSql(this.#queryOf(text) as unknown as string, values)
    } catch (error) {
      // A TypeError means that this pg-boss does not hand its text on as it is.
      const isRefused = error instanceof TypeError
      if (!isRefused && !LOST_NAME.includes((error as { code?: string }).code ?? '')) throw error
      this.#keepsNames = false
      if (isRefused) this.#takesQueries = false
      return await this.executeOnce(text, values)
    }
  }

  /** Runs a statement without keeping its plan. */
  async executeOnce (text: string, values?: unknown[]): Promise<{ rows: unknown[] }> {
    if (!this.#takesQueries) return await this.#db().executeSql(text, values)
    const query: Query = { text, query_timeout: this.#timeoutMs }
    return await this.#db().executeSql(query as unknown as string, values)
  }

  #queryOf (text: string): Query {
    let query = this.#queries.get(text)
    if (query === undefined) {
      query = { name: createHash('sha1').update(text).digest('hex'), text, query_timeout: this.#timeoutMs }
      this.#queries.set(text, query)
    }
    return query
  }
}
