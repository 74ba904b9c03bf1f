// Requests to the server that this page comes from.

const NAME = "herd.key";

export const key = {
  read: () => sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME),
  write(value, keep) {
    key.forget();
    (keep ? localStorage : sessionStorage).setItem(NAME, value);
  },
  forget() {
    sessionStorage.removeItem(NAME);
    localStorage.removeItem(NAME);
  },
};

// What to do about an error, by its code or its status.
const CURES = {
  context_length_exceeded: "Leave out the oldest messages, shorten this one, or start a new chat.",
  insufficient_quota:
    "Set a smaller “Longest answer” in the settings, or ask whoever runs this server for a higher budget.",
  rate_limit_exceeded: "This key has sent much in a short time. Wait a moment, then try again.",
  too_many_concurrent_requests: "Other answers of this key are still open. Stop one, or wait for it.",
  store_unavailable: "The server cannot check keys at the moment. Try again soon.",
  permission_denied: "Sign in with a key that may do this.",
  401: "Sign in with a valid key.",
  413: "Shorten the message, or attach less.",
  503: "The server is busy. Try again in a few seconds.",
  0: "Check that herd serve is still running and that you are connected, then try again.",
};

export class Problem extends Error {
  constructor(status, { message, code } = {}, wait = 0) {
    super(message || `The server answered with status ${status}.`);
    const general = status >= 500 ? "Try again. If this goes on, the server's log says more." : "";
    Object.assign(this, { status, code, wait, cure: CURES[code] ?? CURES[status] ?? general });
  }
}

async function request(path, options = {}) {
  const token = key.read();
  const headers = { "content-type": "application/json", ...(token && { authorization: `Bearer ${token}` }) };
  let response;
  try {
    response = await fetch(path, {
      ...options,
      headers,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, { message: "The server does not answer." });
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Problem(response.status, body.error, Number(response.headers.get("retry-after")) || 0);
}

export const json = async (path, options) => (await request(path, options)).json();
export const listModels = async () => (await json("/v1/models")).data;
export const listTools = () => json("/herd/v1/tools").then(({ tools }) => tools, () => []);
export const listPrompts = () => json("/herd/v1/prompts").catch(() => ({}));

// Yields the chunks of a streamed chat completion. Throws a Problem, or AbortError after `signal`.
export async function* streamChat(body, signal) {
  const more = { stream: true, stream_options: { include_usage: true } };
  const response = await request("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, ...more }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    const events = (rest + (value ?? "")).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = Array.from(event.matchAll(/^data: ?(.*)$/gm), ([, text]) => text).join("\n");
      if (data === "[DONE]") return;
      // A comment that keeps the connection open
      if (!data) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Problem(chunk.error.status ?? 500, chunk.error);
      yield chunk;
    }
    if (done) throw new Problem(0, { message: "The connection was closed before the answer was complete." });
  }
}
