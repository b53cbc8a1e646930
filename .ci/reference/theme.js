/** Pages that are read like declarations: the code of one says its types, and prose beside it only what the code does not say. */
import { ReflectionKind } from 'typedoc'
import { MarkdownTheme, MarkdownThemeContext } from 'typedoc-plugin-markdown'

const LINE = 110

export class CompactTheme extends MarkdownTheme {
  getRenderContext (page) {
    return new CompactContext(this, page, this.application.options)
  }
}

class CompactContext extends MarkdownThemeContext {
  constructor (...args) {
    super(...args)
    const { someType } = this.partials
    Object.assign(this.partials, {
      memberWithGroups: (model, { headingLevel }) => this.withMembers(model, headingLevel),
      signatures: ({ name, signatures }) => this.called(name, signatures),
      declaration: model => paragraphs(this.code(this.declared(model)), this.prose(model.comment)),
      comment: comment => this.prose(comment),
      members: (models, options) => paragraphs(...models.map(model => this.partials.memberContainer(model, options))),
      someType: type => isForeign(type) ? `\`${type.name}\`` : someType(type),
      referenceMember: model => `The same as ${this.linked(model.getTargetReflectionDeep())}.`
    })
  }

  contents ({ children }) {
    const pages = children.toSorted((a, b) => Number(isMain(b)) - Number(isMain(a))).map(module => `- [fastify-background-tasks${isMain(module) ? '' : `/${module.name}`}](${this.urlTo(module)}): ${firstSentence(this.summary(module.comment))}`)
    return paragraphs('Made from the doc comments by `npm run reference`.', pages.join('\n'))
  }

  /** A page, a class or an interface. */
  withMembers (model, headingLevel) {
    if (model.kind === ReflectionKind.Project) return this.contents(model)
    if (model.kind === ReflectionKind.Module) return paragraphs(this.prose(model.comment), this.partials.body(model, { headingLevel }))
    const { children = [], signatures } = model
    const of = (...kinds) => children.filter(({ kind, flags }) => kinds.includes(kind) && !flags.isExternal)
    const fields = of(ReflectionKind.Property, ReflectionKind.Accessor)
    const isClass = model.kind === ReflectionKind.Class
    const beside = this.generics(model) + this.heritage(model)
    return paragraphs(
      (isClass || beside !== '') && this.code(`${isClass ? 'class' : 'interface'} ${model.name}${beside}`),
      this.prose(model.comment),
      this.toldList(model.typeParameters),
      ...of(ReflectionKind.Constructor).map(({ signatures }) => this.called(`new ${model.name}`, signatures)),
      signatures && this.called(model.name[0].toLowerCase() + model.name.slice(1), signatures),
      fields.length > 0 && this.table(fields),
      ...of(ReflectionKind.Method).map(method => paragraphs(`${'#'.repeat(headingLevel)} ${method.name}()`, this.called(method.flags.isOptional ? `${method.name}?` : method.name, method.signatures)))
    )
  }

  /** What can be called: the code of all signatures, and what is said of each in prose, once. */
  called (name, signatures) {
    const told = signatures.filter(({ comment }) => comment !== undefined && !comment.similarTo(signatures[0].comment))
    const common = signatures[0].comment === undefined ? told : [signatures[0], ...told]
    // Signatures that are told of one by one have their code above their prose.
    if (common.length > 1) return paragraphs(...signatures.map(signature => paragraphs(this.code(this.signature(name, signature)), this.toldOf(signature))))
    return paragraphs(this.code(signatures.map(signature => this.signature(name, signature)).join('\n')), ...common.map(signature => this.toldOf(signature)))
  }

  toldOf ({ comment, parameters }) {
    return paragraphs(this.summary(comment), this.toldList(parameters), this.tags(comment))
  }

  toldList (parameters = []) {
    const told = parameters.filter(({ comment }) => comment?.hasVisibleComponent())
    return told.map(({ name, comment }) => `- \`${name}\`: ${this.summary(comment)}`).join('\n')
  }

  prose (comment) {
    return comment === undefined ? '' : paragraphs(this.summary(comment), this.tags(comment))
  }

  summary (comment) {
    return comment === undefined ? '' : this.helpers.getCommentParts(comment.summary)
  }

  tags (comment) {
    const texts = tag => (comment?.getTags(tag) ?? []).map(({ content }) => this.helpers.getCommentParts(content).trim())
    const [returns, throws] = [texts('@returns'), texts('@throws').map(linkCodes)]
    return paragraphs(
      ...returns.map(text => `Returns ${text}`),
      throws.length > 1 ? `Throws\n${throws.map(text => `- ${text}`).join('\n')}` : throws[0] && `Throws ${throws[0]}`
    )
  }

  /** Properties, with those of the objects in them; a default that is code, as code. */
  table (fields) {
    const flattened = this.helpers.getFlattenedDeclarations(fields)
    const rows = flattened.map(field => {
      const comment = field.comment ?? field.getSignature?.comment ?? field.signatures?.[0]?.comment
      const [initial = ''] = (comment?.getTags('@default') ?? []).map(({ content }) => defaultOf(this.helpers.getCommentParts(content)))
      const type = this.helpers.getDeclarationType(field)
      const shown = field.type?.declaration?.children !== undefined ? '`object`' : withoutFirstBars(this.partials.someType(type))
      return [`\`${field.name}${field.flags.isOptional ? '?' : ''}\``, shown, initial, this.prose(comment)].map(cell)
    })
    const columns = ['Property', 'Type', 'Default', 'Description'].filter((_, column) => column === 0 || rows.some(row => row[column] !== ''))
    const kept = ['Property', 'Type', 'Default', 'Description'].map(column => columns.includes(column))
    const line = cells => `| ${cells.join(' | ')} |`
    return [line(columns), line(columns.map(() => '---')), ...rows.map(row => line(row.filter((_, column) => kept[column])))].join('\n')
  }

  declared (model) {
    const type = this.plain(model.type)
    if (model.kind !== ReflectionKind.TypeAlias) return `const ${model.name}: ${type}`
    const parts = model.type.type === 'union' && type.length > LINE ? model.type.types.map(type => `\n  | ${this.plain(type)}`).join('') : ` ${type}`
    return `type ${model.name}${this.generics(model)} =${parts}`
  }

  signature (name, signature) {
    const parameters = (signature.parameters ?? []).map(({ name, type, flags, defaultValue }) => {
      const optional = flags.isOptional || defaultValue !== undefined
      return `${flags.isRest ? '...' : ''}${name}${optional ? '?' : ''}: ${this.plain(type)}`
    })
    const isConstructor = signature.kind === ReflectionKind.ConstructorSignature
    const [start, end] = [`${name}${isConstructor ? '' : this.generics(signature)}`, isConstructor ? '' : `: ${this.plain(signature.type)}`]
    const line = `${start}(${parameters.join(', ')})${end}`
    return line.length <= LINE ? line : `${start}(\n${parameters.map(parameter => `  ${parameter}`).join(',\n')}\n)${end}`
  }

  generics ({ typeParameters = [] }) {
    const texts = typeParameters.map(({ name, flags, type, default: initial }) =>
      `${flags.isConst ? 'const ' : ''}${name}${type === undefined ? '' : ` extends ${this.plain(type)}`}${initial === undefined ? '' : ` = ${this.plain(initial)}`}`)
    return texts.length === 0 ? '' : `<${texts.join(', ')}>`
  }

  /** What the core alone calls has no page, and is not named. */
  heritage ({ extendedTypes = [], implementedTypes = [] }) {
    const list = (word, types) => types.length === 0 ? '' : ` ${word} ${types.map(type => this.plain(type)).join(', ')}`
    return list('extends', extendedTypes) + list('implements', implementedTypes.filter(({ reflection }) => reflection !== undefined))
  }

  plain (type) {
    const markdown = withoutFirstBars(this.partials.someType(type))
    return markdown.replace(/\[`([^`]+)`\]\([^)]*\)/g, '$1').replace(/`/g, '').replace(/\*(\w+)\*/g, '$1').replace(/\\([<>|[\]{}*_`\\])/g, '$1')
  }

  code (text) {
    return `\`\`\`ts\n${text}\n\`\`\``
  }

  linked (model) {
    return `[\`${model.name}\`](${this.urlTo(model)})`
  }
}

function paragraphs (...texts) {
  return texts.filter(Boolean).join('\n\n')
}

function cell (text) {
  return text.replace(/```ts\n(.*?)\n```/gs, '`$1`').replace(/\s*\n\s*-\s+/g, '<br>- ').replace(/\s+/g, ' ').trim()
}

/** Of another package: what its type parameters are by default says nothing here. */
function isForeign (type) {
  return type.type === 'reference' && type.package !== undefined && !['typescript', 'fastify-background-tasks'].includes(type.package)
}

/** A long union begins with a bar, for it was on lines of its own. */
function withoutFirstBars (markdown) {
  return markdown.replace(/\s+/g, ' ').replace(/(^|[<(]|[:,] ?|\*?extends\*? )\\?\| /g, '$1')
}

function isMain ({ name }) {
  return name === 'fastify-background-tasks'
}

function firstSentence (text) {
  return text.split(/\.\s/)[0].replace(/\s+/g, ' ').replace(/\.?$/, '.')
}

/** What is no value is a sentence, which TypeDoc took for code. */
function defaultOf (text) {
  const value = text.replace(/^```ts\n|\n```$/g, '').trim()
  return /^(?:['"{[]|[\d.]+$|true$|false$|Infinity$)/.test(value) ? `\`${value}\`` : value
}

/** Every code has its place among the errors. */
function linkCodes (text) {
  return text.replace(/`?\b(FST_BGT_[A-Z_]+)`?/g, (_, code) => `[\`${code}\`](../errors.md#${code.toLowerCase()})`)
}
