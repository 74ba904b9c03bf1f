// The state of the page, and those who draw it. `set` changes it and draws once before the next frame.
import { html, render } from "./vendor/preact.js";

export const state = {
  // The models, as /v1/models lists them
  models: [],
  // Every chat of this browser without its messages, newest first
  chats: [],
  // The open chat. A new one is stored with its first message
  chat: null,
  // The messages of the open chat in all its branches
  messages: [],
  // The tools on the server that the key may use, as /herd/v1/tools lists them
  tools: [],
  // System messages that an administrator shares: name -> text
  prompts: {},
  // The files of the message that is being written
  files: [],
  // The places that the search found
  results: [],
};

const views = [];
let waiting = false;

export function show(id, view) {
  views.push(() => render(html`<${view} />`, document.getElementById(id)));
}

export function set(changes = {}) {
  Object.assign(state, changes);
  if (waiting) return;
  waiting = true;
  queueMicrotask(() => {
    waiting = false;
    for (const draw of views) draw();
  });
}

export const number = (value) => Number(value).toLocaleString("en");
export const $ = (id) => document.getElementById(id);
export const say = (text) => ($("status").textContent = text);
export const icon = (name) => html`<svg aria-hidden="true"><use href=${"#i-" + name} /></svg>`;
export const newId = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");

// Shows a line at the bottom for a while, with an action such as "Undo".
let hiding;
export function toast(text, label, action) {
  const button = $("toast").querySelector("button");
  $("toast").firstElementChild.textContent = text;
  button.hidden = !label;
  button.textContent = label ?? "";
  const hide = () => ($("toast").hidden = true);
  button.onclick = () => (hide(), action());
  $("toast").hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(hide, 8000);
}
