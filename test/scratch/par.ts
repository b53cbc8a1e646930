import { paragraphsOf } from '../support/docs/paragraphs.js'
console.log(paragraphsOf('frameworks.md', [...['when', 'nest', 'trpc', 'graphql', 'express'].map(name => `guides/frameworks/${name}.ts`), 'support/nest-service.ts']).missing.join('\n-----\n'))
