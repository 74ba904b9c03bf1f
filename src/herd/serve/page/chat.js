// What a user can do with a chat: send, stop, edit, answer again, leave out, delete.
import { Problem, streamChat } from "./api.js";
import { $, newId, say, set, state, toast } from "./state.js";
import { erase, listChats, readMessages, write } from "./storage.js";
import { promptFor, readTurns, reveal, slotOf } from "./tree.js";

const SAVE_MS = 2000;
const DEFAULTS = "herd.settings";
// Answers that are being written: id -> {message, stop, paint}
const open = new Map();

export const isOpen = (message) => open.has(message.id);
export const anyOpen = () => state.messages.some(isOpen);
export const onText = (message, paint) => open.has(message.id) && (open.get(message.id).paint = paint);
export const currentTurns = () => readTurns(state.messages, state.chat.chosen);

export function newChat() {
  const settings = JSON.parse(localStorage.getItem(DEFAULTS) ?? "{}");
  const models = state.models.slice(0, 1).map(({ id }) => id);
  set({
    messages: [],
    chat: { id: newId(), title: "", models, settings, chosen: {}, created: Date.now(), updated: 0 },
  });
}

// Opens the chat of the address, `#ID`, or a new one. `place`: a message that is then shown.
export async function openChat(id, place) {
  const chat = state.chats.find((each) => each.id === id);
  if (!chat) return newChat();
  const messages = (await readMessages(id)).map((message) => open.get(message.id)?.message ?? message);
  const known = chat.models.filter((model) => state.models.some((each) => each.id === model));
  const models = known.length ? known : state.models.slice(0, 1).map((each) => each.id);
  set({ messages, chat: { ...chat, models, chosen: place ? reveal(messages, chat.chosen, place) : chat.chosen } });
}

export const refreshChats = async () => set({ chats: await listChats() });

// Changes the open chat, and stores it if it has messages.
export async function change(changes) {
  const chat = { ...state.chat, ...changes };
  if (changes.settings) localStorage.setItem(DEFAULTS, JSON.stringify(changes.settings));
  set({ chat });
  if (chat.updated) await keep([chat]);
}

// Stores chats and messages, or says that the browser refuses to.
export async function keep(chats, messages) {
  try {
    await write(chats, messages);
    if (chats.length) await refreshChats();
  } catch (error) {
    toast(`This browser could not store the chat (${error?.name}). Export it before you leave.`);
  }
}

const shorten = (text) => (text.length > 48 ? `${text.slice(0, 48).replace(/\s+\S*$/, "")}…` : text);

// Adds a message to the open chat, shows it, and stores both.
function add(fields) {
  // The order of siblings
  const created = Math.max(Date.now(), (state.messages.at(-1)?.created ?? 0) + 1);
  const message = { id: newId(), chat: state.chat.id, created, content: "", ...fields };
  const { chat } = state;
  const title = chat.title || shorten(message.content.trim()) || message.files?.[0].name || "Chat";
  const changed = {
    ...chat,
    title,
    updated: Date.now(),
    chosen: { ...chat.chosen, [slotOf(message)]: message.id },
  };
  set({ messages: [...state.messages, message], chat: changed });
  keep([changed], [message]);
  if (location.hash !== `#${chat.id}`) history.pushState(null, "", `#${chat.id}`);
  return message;
}

export function send(content, files, parent = currentTurns().end) {
  const message = add({ role: "user", lane: 0, parent, content, ...(files.length && { files }) });
  for (const lane of state.chat.models.keys()) answer(message.id, lane);
}

export const answerAgain = ({ parent, lane }) => answer(parent, lane);

// Sends the results of an answer's tool calls, and asks for the next answer.
export function sendResults({ id, lane }, results) {
  answer(add({ role: "tool", parent: id, lane, results }).id, lane);
}

export const stop = () => state.messages.forEach(({ id }) => open.get(id)?.stop.abort());

// Leaves the first half of the messages out of what is sent, and answers again.
export function leaveOutOldest(message) {
  const { turns } = currentTurns();
  const first = Math.max(
    0,
    turns.findIndex(({ user }) => user.id === state.chat.start),
  );
  const start = turns[Math.ceil((first + turns.length) / 2)] ?? turns.at(-1);
  change({ start: start.user.id });
  answerAgain(message);
}

async function answer(parent, lane) {
  const { chat } = state;
  const model = chat.models[lane] ?? chat.models[0] ?? "";
  const { system, tools, schema, use, ...sampling } = chat.settings;
  // Noted, so that it can be repeated
  const seed = sampling.seed ?? crypto.getRandomValues(new Uint32Array(1))[0] % 2 ** 31;
  const message = add({ role: "assistant", parent, lane, model, settings: { ...sampling, seed }, reasoning: "" });
  const messages = promptFor(currentTurns().turns, message, system, chat.start);
  const body = { model, messages, ...message.settings };
  const groups = use?.split(",").filter((name) => state.tools.some(({ group }) => group === name)) ?? [];
  const served = groups.map((name) => ({ type: "herd", name }));
  if (tools || served.length) body.tools = [...served, ...(tools ? JSON.parse(tools) : [])];
  if (schema) {
    const answerSchema = { name: "answer", strict: true, schema: JSON.parse(schema) };
    body.response_format = { type: "json_schema", json_schema: answerSchema };
  }
  await receive(message, body);
}

// Fills an answer with what the server streams.
async function receive(message, body) {
  const entry = { message, stop: new AbortController(), paint() {} };
  open.set(message.id, entry);
  set();
  say("The model is answering.");
  const started = performance.now();
  let saved = started;
  try {
    for await (const chunk of streamChat(body, entry.stop.signal)) {
      read(chunk, message, started);
      entry.paint();
      if (performance.now() - saved > SAVE_MS) {
        saved = performance.now();
        keep([], [message]);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") message.end = "stopped";
    else {
      const { message: text, status, code, cure, wait } = error;
      message.problem = { text, status, code, cure, wait };
      if (status === 401) $("signin").showModal();
      if (!(error instanceof Problem)) console.error(error);
    }
  }
  message.seconds = (performance.now() - started) / 1000;
  open.delete(message.id);
  // A new object, so that its view is drawn again
  const finished = { ...message };
  set({ messages: state.messages.map((each) => (each.id === message.id ? finished : each)) });
  say(message.problem ? `Error: ${message.problem.text}` : `Answer: ${message.content.slice(0, 2000)}`);
  await keep([], [finished]);
}

// Adds what a chunk says to the message.
function read(chunk, message, started) {
  const { delta = {}, finish_reason } = chunk.choices?.[0] ?? {};
  const thought = delta.reasoning_content ?? delta.reasoning;
  if (delta.content || thought || delta.tool_calls || delta.herd_steps) {
    message.firstSeconds ??= (performance.now() - started) / 1000;
    message.pieces = (message.pieces ?? 0) + 1;
  }
  if (delta.content) message.content += delta.content;
  if (thought) message.reasoning += thought;
  for (const { index = 0, id, function: called = {} } of delta.tool_calls ?? []) {
    message.calls ??= [];
    const call = (message.calls[index] ??= { id, name: "", arguments: "" });
    call.name ||= called.name ?? "";
    call.arguments += called.arguments ?? "";
  }
  // A call that the server runs comes first without its result, and then with it
  for (const step of delta.herd_steps ?? []) {
    const steps = (message.steps ?? []).filter(({ id }) => id !== step.id);
    message.steps = [...steps, step];
  }
  if (finish_reason) message.end = finish_reason;
  if (chunk.usage) message.usage = chunk.usage;
  if (chunk.timings) message.timings = chunk.timings;
  // Warnings and cost
  if (chunk.herd) message.herd = chunk.herd;
}

export async function deleteChat(chat) {
  const messages = await readMessages(chat.id);
  await erase(chat.id);
  await refreshChats();
  if (state.chat.id === chat.id) location.hash = "";
  toast(`“${chat.title}” is deleted.`, "Undo", () => keep([chat], messages));
}
