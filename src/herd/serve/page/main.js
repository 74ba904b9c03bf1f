// Starts the page and connects its buttons, keys and fields.
import { key, listModels, listPrompts, listTools } from "./api.js";
import { anyOpen, change, newChat, openChat, refreshChats, send, stop } from "./chat.js";
import { Card, Chats, Files, Meter, Models, Prompts, Results, ServerTools } from "./panels.js";
import { $, set, show, state, toast } from "./state.js";
import { search } from "./storage.js";
import { Thread } from "./thread.js";

// Characters: longer pasted texts become a file
const LONG_PASTE = 2500;
const MAX_FILE = 2_000_000;
const isNarrow = () => matchMedia("(max-width: 760px)").matches;
const root = document.documentElement;
const scroller = $("scroller");
const draft = $("draft");

// ---- composing
function attach(name, text) {
  const file = { name, text, remove: () => set({ files: state.files.filter((each) => each !== file) }) };
  set({ files: [...state.files, file] });
}

async function attachFiles(files) {
  for (const file of files) {
    if (file.size > MAX_FILE) toast(`${file.name} is larger than ${MAX_FILE / 1e6} MB: attach a part of it.`);
    else if ((await file.text()).includes("\0")) toast(`${file.name} is not a text file.`);
    else attach(file.name, await file.text());
  }
}

function grow() {
  draft.style.height = "auto";
  draft.style.height = `${draft.scrollHeight}px`;
  set();
}

function submit() {
  const text = draft.value.trim();
  if (anyOpen() || !(text || state.files.length)) return;
  if (!state.models.length) return start();
  pin(true);
  const files = state.files.map(({ name, text: content }) => ({ name, text: content }));
  draft.value = "";
  // Turns far above the end are not drawn any more
  set({ files: [], drawn: undefined });
  grow();
  send(text, files);
}

$("composer").onsubmit = (event) => (event.preventDefault(), submit());
draft.oninput = grow;
draft.onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), submit());
  if (event.key === "ArrowUp" && !draft.value) [...document.querySelectorAll("[data-edit]")].at(-1)?.click();
};
draft.onpaste = (event) => {
  const text = event.clipboardData.getData("text/plain");
  if (event.clipboardData.files.length) attachFiles(event.clipboardData.files);
  else if (text.length > LONG_PASTE) attach(`Pasted text ${state.files.length + 1}.txt`, text);
  else return;
  event.preventDefault();
};
$("attach").onchange = ({ target }) => attachFiles([...target.files]).then(() => (target.value = ""));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => (event.preventDefault(), attachFiles(event.dataTransfer.files)));

// ---- scrolling: the view stays at the end until the user scrolls up
let pinned = true;
function pin(isAtEnd) {
  pinned = isAtEnd;
  $("newest").hidden = pinned;
}
const toEnd = () => (scroller.scrollTop = scroller.scrollHeight);
let lastTop = 0;
scroller.onscroll = () => {
  const { scrollTop, scrollHeight, clientHeight } = scroller;
  // A text may have grown between a scroll and its event: only a move up unpins
  pin(scrollHeight - scrollTop - clientHeight < 40 || (pinned && scrollTop >= lastTop));
  lastTop = scrollTop;
};
new ResizeObserver(() => pinned && toEnd()).observe($("thread"));

// ---- settings of the chat
const fields = [...$("settings").elements].filter(({ name }) => name);
function fillSettings() {
  for (const field of fields)
    if (field !== document.activeElement) field.value = state.chat?.settings[field.name] ?? "";
}
$("settings").oninput = $("settings").onreset = (event) =>
  setTimeout(() => {
    const { use } = event.type === "reset" ? {} : (state.chat?.settings ?? {});
    const settings = { ...(use && { use }) };
    for (const field of fields) {
      field.setCustomValidity(jsonProblem(field));
      field.classList.toggle("wrong", !field.validity.valid);
      if (field.value.trim() && field.validity.valid)
        settings[field.name] = field.type === "number" ? Number(field.value) : field.value;
    }
    change({ settings });
  });
$("settings").onsubmit = (event) => event.preventDefault();
function jsonProblem({ value, dataset }) {
  if (!dataset.json || !value.trim()) return "";
  try {
    const type = Array.isArray(JSON.parse(value)) ? "array" : typeof JSON.parse(value);
    return type === dataset.json ? "" : `This must be a JSON ${dataset.json}.`;
  } catch (error) {
    return error.message;
  }
}

// ---- the address is #ID of the open chat
let shownAt;
async function followAddress(place) {
  pin(!place);
  set({ drawn: place ? Infinity : undefined });
  await openChat(location.hash.slice(1), place);
  fillSettings();
  if (isNarrow()) root.classList.remove("side-open");
  if (!$("search").open) draft.focus({ preventScroll: true });
}
addEventListener("hashchange", () => followAddress(shownAt).then(() => (shownAt = undefined)));
$("results").onclick = (event) => {
  const link = event.target.closest("a");
  if (!link) return;
  $("search").close();
  shownAt = link.dataset.place;
  if (link.hash === location.hash) followAddress(shownAt);
};
let searching = Promise.resolve();
$("query").oninput = ({ target: { value } }) => {
  searching = search(value, state.chats).then((results) => value === $("query").value && set({ results }));
};
$("search").onkeydown = (event) => {
  const links = [...$("results").children];
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) links[links.indexOf(document.activeElement) + step]?.focus();
  // The results of the last key may still be on their way
  else if (event.key === "Enter" && event.target === $("query"))
    searching.then(() => requestAnimationFrame(() => $("results").firstElementChild?.click()));
  else return;
  event.preventDefault();
};
$("title").onchange = ({ target }) => change({ title: target.value.trim() || "Chat" });

// ---- signing in
$("signin-form").onsubmit = async (event) => {
  event.preventDefault();
  key.write($("key").value.trim(), $("keep").checked);
  $("key").value = "";
  await start();
};
async function start() {
  const problem = $("signin-problem");
  problem.hidden = true;
  try {
    const [models, tools, prompts] = await Promise.all([listModels(), listTools(), listPrompts()]);
    set({ models, tools, prompts });
    $("signin").close();
  } catch (error) {
    set({ models: [] });
    if (error.status !== 401) return toast(`${error.message} ${error.cure}`, "Try again", start);
    problem.hidden = !key.read();
    problem.textContent = error.message;
    if (!$("signin").open) $("signin").showModal();
  }
  if (!state.chat?.updated) newChat();
  document.querySelector("[data-do=sign-out]").hidden = !key.read();
  $("usage-button").hidden = !key.read() || !state.models.length;
  $("key-button").hidden = !key.read() && state.models.length > 0;
}

// ---- what the buttons do
const exportAll = async (chats) => (await import("./exchange.js")).exportChats(chats);
const toggle = (dialog) => (dialog.open ? dialog.close() : dialog.showModal());
const DO = {
  new: () => (location.hash ? (location.hash = "") : followAddress()),
  search: () => {
    toggle($("search"));
    $("query").select();
    $("query").oninput({ target: $("query") });
  },
  sidebar() {
    if (isNarrow()) return root.classList.toggle("side-open");
    root.dataset.side = root.dataset.side === "closed" ? "" : "closed";
    localStorage.setItem("herd.side", root.dataset.side);
  },
  settings() {
    $("drawer").hidden = !$("drawer").hidden;
    if (!$("drawer").hidden) fields[0].focus();
  },
  theme() {
    const isDark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    localStorage.setItem("herd.theme", (root.dataset.theme = isDark ? "light" : "dark"));
  },
  usage: async () => (await import("./usage.js")).openUsage(),
  card: () => toggle($("card")),
  newest: toEnd,
  stop,
  export: () => exportAll([state.chat]),
  "export-all": () => exportAll(state.chats),
  "pick-import": () => $("import").click(),
  "pick-files": () => $("attach").click(),
  "sign-in": () => $("signin").showModal(),
  "sign-out": () => (key.forget(), start()),
};
$("import").onchange = async ({ target }) => {
  await (await import("./exchange.js")).importChats(await target.files[0].text());
  target.value = "";
};

addEventListener("click", async ({ target }) => {
  const button = target.closest("[data-do], [data-copy]");
  // A click beside it
  if (target.tagName === "DIALOG") target.close();
  if (!button) return;
  DO[button.dataset.do]?.();
  if (!button.dataset.copy) return;
  const text = button.dataset.text ?? button.closest("figure").querySelector("code").textContent;
  await copy(text);
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1500);
});

// Copies a text, also on pages without TLS, where browsers have no clipboard object.
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = document.body.appendChild(document.createElement("textarea"));
  field.value = text;
  field.select();
  document.execCommand("copy");
  field.remove();
}

addEventListener("keydown", (event) => {
  const name =
    (event.ctrlKey || event.metaKey ? "ctrl " : "") + (event.shiftKey ? "shift " : "") + event.key.toLowerCase();
  const action = { "ctrl k": DO.search, "ctrl b": DO.sidebar, "ctrl shift o": DO.new }[name];
  if (action) (event.preventDefault(), action());
  if (name !== "escape" || document.querySelector("dialog[open]")) return;
  const box = toolbox();
  if (!box) return stop();
  box.open = false;
  box.querySelector("summary").focus();
});

// The list of tools closes when something else on the page is used.
const toolbox = () => document.querySelector(".toolbox[open]");
const closeToolbox = ({ target }) => {
  const box = toolbox();
  if (box && !box.contains(target)) box.open = false;
};
addEventListener("pointerdown", closeToolbox);
addEventListener("focusin", closeToolbox);

// ---- start
for (const [id, view] of Object.entries({
  chats: Chats,
  thread: Thread,
  models: Models,
  results: Results,
  card: Card,
  meter: Meter,
  files: Files,
  "server-tools": ServerTools,
  prompts: Prompts,
}))
  show(id, view);
show("title", () => {
  const { chat } = state;
  document.title = chat?.title ? `${chat.title} · Herd` : "Herd";
  if (document.activeElement !== $("title")) $("title").value = chat?.title ?? "";
  $("title").disabled = !chat?.updated;
  $("thread").classList.toggle(
    "wide",
    state.messages.some(({ lane }) => lane),
  );
  $("stop").hidden = !anyOpen();
  $("send").hidden = anyOpen();
  return null;
});
// Another tab may have changed them
addEventListener("focus", refreshChats);

// A link only writes the draft: it cannot spend tokens
const question = new URLSearchParams(location.search).get("q");
if (question) {
  draft.value = question;
  history.replaceState(null, "", location.pathname + location.hash);
}
const models = start();
await refreshChats().catch((error) =>
  toast(`This browser cannot keep chats (${error?.name}): they end with this tab.`),
);
await models;
await followAddress();
grow();
