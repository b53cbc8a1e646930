/** A queue, first in, first out, in which each `shift` costs the same. `shift` of an array moves all items that come after. */
export class Queue<T> {
  #items: T[] = []
  /** The number of items at the front that have left. */
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

  /** Takes an item out of the queue. Most items leave in the order in which they came. */
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
    // Half of the array is dropped at a time, so that a queue that is never empty does not hold items that have left for long.
    if (2 * this.#left < this.#items.length) return
    this.#items = this.#items.slice(this.#left)
    this.#left = 0
  }
}
