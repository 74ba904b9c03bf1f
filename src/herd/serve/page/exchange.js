// Chats to a file and back.
import { keep } from "./chat.js";
import { toast } from "./state.js";
import { readMessages } from "./storage.js";

// Writes chats with all their branches, times and settings.
export async function exportChats(chats) {
  const full = await Promise.all(chats.map(async (chat) => ({ ...chat, messages: await readMessages(chat.id) })));
  const text = JSON.stringify({ format: "herd-chats", version: 1, chats: full }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = chats.length === 1 ? "herd-chat.json" : "herd-chats.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// What a file may have: s is text, n a number, a list has such objects, and "*" is for every name.
const CALL = { id: "s", name: "s", arguments: "s", content: "s", text: "s" };
const STEP = { ...CALL, ok: "b" };
const NUMBERS = { "*": "n" };
const SETTINGS = { system: "s", tools: "s", use: "s", schema: "s", "*": "n" };
const MESSAGE = {
  ...{
    id: "s",
    parent: "s",
    role: "s",
    lane: "n",
    model: "s",
    created: "n",
    content: "s",
    reasoning: "s",
    end: "s",
  },
  ...{
    files: [CALL],
    calls: [CALL],
    steps: [STEP],
    results: [CALL],
    settings: SETTINGS,
    firstSeconds: "n",
    seconds: "n",
    pieces: "n",
  },
  ...{ usage: { prompt_tokens_details: NUMBERS, "*": "n" }, timings: NUMBERS },
  ...{
    problem: { text: "s", code: "s", cure: "s", "*": "n" },
    herd: { warnings: "l", cost: { amount: "s", currency: "s" }, steps: [NUMBERS] },
  },
};
const CHAT = {
  ...{
    id: "s",
    title: "s",
    created: "n",
    updated: "n",
    start: "s",
    settings: SETTINGS,
    models: "l",
    chosen: { "*": "s" },
  },
  messages: [MESSAGE],
};

// Returns the parts of a value that have the right type.
function fit(value, type) {
  if (type === "s") return typeof value === "string" ? value : undefined;
  if (type === "b") return Boolean(value);
  if (type === "n") return Number.isFinite(value) ? value : undefined;
  if (type === "l") return Array.isArray(value) ? value.map(String) : undefined;
  if (Array.isArray(type)) return Array.isArray(value) ? value.map((each) => fit(each, type[0]) ?? {}) : undefined;
  if (typeof value !== "object" || !value) return undefined;
  const fields = Object.entries(value).map(([name, each]) => [name, fit(each, type[name] ?? type["*"] ?? {})]);
  return Object.fromEntries(fields.filter(([name, each]) => each !== undefined && (type[name] || type["*"])));
}

// Reads such a file. A chat that is here already is replaced.
export async function importChats(text) {
  let chats;
  try {
    const file = JSON.parse(text);
    if (file.format !== "herd-chats") throw new Error("format");
    chats = file.chats.map((each) => ({
      title: "Chat",
      updated: 1,
      created: 1,
      settings: {},
      chosen: {},
      models: [],
      ...fit(each, CHAT),
    }));
    for (const { id, messages } of chats) {
      if (!id) throw new Error("id");
      // A parent comes before its children, so that there are no circles
      const known = new Set([""]);
      for (const message of messages) {
        if (!known.has(message.parent) || known.has(message.id)) throw new Error("order");
        known.add(message.id);
      }
    }
  } catch {
    return toast("This file was not exported from this page, or it is damaged.");
  }
  const messages = chats.flatMap((chat) =>
    chat.messages.map((each) => ({ content: "", lane: 0, ...each, chat: chat.id })),
  );
  await keep(
    chats.map(({ messages: _, ...chat }) => chat),
    messages,
  );
  toast(chats.length === 1 ? "One chat is imported." : `${chats.length} chats are imported.`);
}
