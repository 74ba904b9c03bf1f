// The state of the page, and those who draw it. `set` changes it and draws once before the next frame.
import { html, render } from "./vendor/preact.js";

export const state = {
  models: [], // as /v1/models lists them
  chats: [], // every chat of this browser without its messages, newest first
  chat: null, // the open one; a new one is not stored before its first message
  messages: [], // of the open chat, all branches
  results: null, // of the search
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
