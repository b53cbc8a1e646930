/** First in, first out, at the same cost for each: `shift` of an array moves all that comes after. */
export class Queue<T> {
  #items: T[] = []
  /** So many at the front have left. */
  #left = 0

  get length (): number {
    return this.#items.length - this.#left
  }

  push (item: T): void {
    this.#items.push(item)
  }

  shift (): T | undefined {
    const item = this.#items[this.#left]
    if (this.#left < this.#items.length) this.#takeFirst()
    return item
  }

  /** Takes one out: most leave in the order in which they came. */
  remove (item: T): void {
    const index = this.#items.indexOf(item, this.#left)
    if (index === this.#left) this.#takeFirst()
    else if (index !== -1) this.#items.splice(index, 1)
  }

  * [Symbol.iterator] (): Iterator<T> {
    for (let i = this.#left; i < this.#items.length; i++) yield this.#items[i] as T
  }

  #takeFirst (): void {
    this.#left++
    // Half of it at a time, so that one that is never empty holds nothing that has left for long.
    if (2 * this.#left < this.#items.length) return
    this.#items = this.#items.slice(this.#left)
    this.#left = 0
  }
}
