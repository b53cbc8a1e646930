import { createTransport } from 'nodemailer'

export interface Mail {
  to: string
  subject: string
  text: string
}

export interface Mailer {
  /** Resolves once the mail server has taken the mail. */
  sendMail: (mail: Mail) => Promise<void>
  close: () => Promise<void>
}

/**
 * Sends mail by way of an SMTP server.
 * @param smtpUrl such as `smtps://user:password@mail.example.com`
 */
export function smtpMailer (smtpUrl: string): Mailer {
  // Shorter than the drain at shutdown: a mail server that hangs makes a failed task, not an abandoned one.
  const timeouts = { connectionTimeout: 5_000, greetingTimeout: 5_000, socketTimeout: 7_000 }
  const transport = createTransport({ url: smtpUrl, ...timeouts })
  return {
    async sendMail (mail) {
      await transport.sendMail({ from: 'notifications@example.com', ...mail })
    },
    async close () {
      transport.close()
    }
  }
}
