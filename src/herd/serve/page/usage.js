// What keys have used, and for administrators the keys themselves and the shared prompts.
import { json, listPrompts } from "./api.js";
import { $, icon, number, set, state } from "./state.js";
import { html, render } from "./vendor/preact.js";

const send = (method, path, body) => json(path, { method, body: JSON.stringify(body) });
const sharePrompt = (name, text) => send("PUT", `/herd/v1/prompts/${encodeURIComponent(name)}`, { text });
const readUsage = (since) => json(`/herd/v1/usage?since=${since}`);
const listKeys = () => json("/herd/v1/keys");
const createKey = (body) => send("POST", "/herd/v1/keys", body);
const changeKey = (id, body) => send("PATCH", `/herd/v1/keys/${id}`, body);
const revokeKey = (id) => json(`/herd/v1/keys/${id}`, { method: "DELETE" });

const DAYS = 30;
const DAY = 86_400_000;
const WIDTH = 600;
const HEIGHT = 140;
// What the dialog shows: usage, keys (null: not an administrator's key), a new key's text, a problem
let data = {};

const draw = (changes = {}) => {
  data = { ...data, ...changes };
  render(html`<${Panel} ...${data} />`, $("usage"));
};

export async function openUsage() {
  data = {};
  draw();
  $("usage").showModal();
  await load();
}

async function load() {
  const since = new Date(Date.now() - (DAYS - 1) * DAY).toISOString().slice(0, 10);
  await attempt(async () => draw({ usage: await readUsage(since), since }));
  const keys = await listKeys().catch(() => null);
  draw({ keys });
}

// Does something and shows the problem if it fails.
async function attempt(work) {
  draw({ problem: null });
  try {
    await work();
    return true;
  } catch (error) {
    draw({ problem: `${error.message} ${error.cure ?? ""}` });
    return false;
  }
}

const money = (amount, currency) => `${(amount / 1e6).toFixed(2)} ${currency ?? ""}`.trim();
const shown = ({ unit, amount, period }, currency) =>
  `${unit === "tokens" ? `${number(amount)} tokens` : money(amount, currency)}/${period}`;

const left = (budget, currency) =>
  shown({ ...budget, amount: Math.max(0, budget.amount - budget.used - budget.reserved) }, currency).split("/")[0];

function Panel({ usage, since, keys, token, problem }) {
  return html`<button class="quiet close" aria-label="Close" onClick=${() => $("usage").close()}>${icon("close")}</button>
    <h2 id="usage-title">Usage</h2>
    ${problem && html`<p class="problem" role="alert">${problem}</p>`}
    ${usage ? html`<${Chart} ...${{ usage, since }} />` : !problem && html`<p>Loading…</p>`}
    ${usage?.budgets.map(
      (budget) =>
        html`<p>Left of <b>${shown(budget, usage.currency)}</b>: ${left(budget, usage.currency)}</p>`,
    )}
    ${keys && html`<${Keys} ...${{ keys, token, currency: usage?.currency }} /><${Sharing} />`}`;
}

// Bars of the tokens of each day: prompts below, answers above.
function Chart({ usage: { days, currency }, since }) {
  const first = Date.parse(since);
  const bars = Array.from({ length: DAYS }, (_, index) => {
    const day = new Date(first + index * DAY).toISOString().slice(0, 10);
    const rows = days.filter((row) => row.day === day);
    const sum = (name) => rows.reduce((total, row) => total + row[name], 0);
    return { day, prompt: sum("prompt_tokens"), written: sum("completion_tokens"), requests: sum("requests"), cost: sum("money") };
  });
  const total = (name) => bars.reduce((sum, bar) => sum + bar[name], 0);
  const most = Math.max(1, ...bars.map(({ prompt, written }) => prompt + written));
  const step = WIDTH / DAYS;
  const height = (tokens) => (HEIGHT * tokens) / most;
  const summary = `${number(total("requests"))} requests, ${number(total("prompt"))} prompt tokens and ${number(total("written"))} answer tokens in ${DAYS} days${currency ? `, ${money(total("cost"), currency)}` : ""}`;
  return html`<p>${summary}.</p>
    <svg class="chart" viewBox=${`0 0 ${WIDTH} ${HEIGHT + 18}`} role="img" aria-label=${`Tokens by day: ${summary}`}>
      ${bars.map(({ day, prompt, written, requests }, index) => {
        const [low, high] = [height(prompt), height(written)];
        const bar = { x: index * step + 1, width: step - 2 };
        return html`<g>
          <title>${`${day}: ${number(requests)} requests, ${number(prompt)} + ${number(written)} tokens`}</title>
          <rect class="blank" ...${bar} y="0" height=${HEIGHT} />
          <rect ...${bar} y=${HEIGHT - low} height=${low} />
          <rect class="written" ...${bar} y=${HEIGHT - low - high} height=${high} />
        </g>`;
      })}
      <text x="0" y=${HEIGHT + 14}>${bars[0].day}</text>
      <text x=${WIDTH} y=${HEIGHT + 14} text-anchor="end">${bars.at(-1).day}</text>
      <text x="0" y="12">${number(most)}</text>
    </svg>
    <p class="legend"><i></i>prompts <i class="written"></i>answers</p>`;
}

// "500000 tokens/day" or "20 EUR/month" as the API has it. "": no budget.
function readBudget(text) {
  if (!text.trim()) return { policy: { budgets: [] } };
  const [, amount, unit, period] = text.match(/^\s*([\d_.]+)\s*(tokens|[A-Z]{3})\s*\/\s*(day|month)\s*$/) ?? [];
  if (!amount) throw new Error(`${text}: write a budget like 500000 tokens/day or 20 EUR/month.`);
  const value = Number(amount.replaceAll("_", ""));
  const budget = unit === "tokens" ? { unit, period, amount: value } : { unit: "money", period, amount: Math.round(value * 1e6) };
  return { policy: { budgets: [budget] }, ...(unit !== "tokens" && { currency: unit }) };
}

function Keys({ keys, token, currency }) {
  const create = (event) => {
    event.preventDefault();
    const { name, budget } = event.target.elements;
    const use = [...event.target.querySelectorAll("[name=tools]:checked")].map(({ value }) => value);
    attempt(async () => {
      const { policy, currency: unit } = readBudget(budget.value);
      const made = await createKey({ name: name.value, policy: { ...policy, tools: use }, ...(unit && { currency: unit }) });
      event.target.reset();
      draw({ token: made.key });
      await load();
    });
  };
  const change = (id) => async (event) => {
    event.preventDefault();
    await attempt(async () => {
      await changeKey(id, readBudget(event.target.elements.budget.value));
      await load();
    });
  };
  const revoke = (id, name) => () =>
    confirm(`Revoke the key ${name} for ever?`) && attempt(async () => (await revokeKey(id), await load()));
  const groups = [...new Set(state.tools.map(({ group }) => group))];
  return html`<h2>Keys</h2>
    ${
      token &&
      html`<p class="token" role="status">
        The new key, shown only this once: <code>${token}</code>
        <button class="quiet" data-copy="text" data-text=${token} aria-label="Copy" title="Copy">${icon("copy")}</button>
      </p>`
    }
    <div class="rows">
      ${keys
        .filter(({ state: now }) => now === "active")
        .map(({ id, name, policy }) => {
          const budgets = policy.budgets.map((budget) => shown(budget, currency)).join("; ").replaceAll(",", "");
          // A new key after a change, so that the field shows it
          return html`<form key=${id + budgets} onSubmit=${change(id)}>
              <b>${name}</b>
              <small>${policy.scopes.includes("admin") ? "administrator" : policy.tools.join(", ")}</small>
              <input
                name="budget"
                aria-label=${`Budget of ${name}`}
                placeholder="no budget"
                defaultValue=${budgets}
                disabled=${policy.budgets.length > 1}
              />
              <button>Save</button>
              <button type="button" onClick=${revoke(id, name)} aria-label=${`Revoke ${name}`}>Revoke</button>
            </form>`;
        })}
    </div>
    <form class="new" onSubmit=${create}>
      <input name="name" required maxlength="64" aria-label="Name of the new key" placeholder="Name, e.g. alice" />
      <input name="budget" aria-label="Budget of the new key" placeholder="500000 tokens/day" />
      ${groups.map((name) => html`<label class="check"><input type="checkbox" name="tools" value=${name} />${name}</label>`)}
      <button class="main">Create key</button>
    </form>`;
}

// Shares the system message of the chat under a name, or stops sharing one.
function Sharing() {
  const { system } = state.chat?.settings ?? {};
  const store = (name, text) =>
    attempt(async () => {
      await sharePrompt(name, text);
      set({ prompts: await listPrompts() });
      draw();
    });
  const share = (event) => {
    event.preventDefault();
    store(event.target.elements.name.value, system);
  };
  return html`<h2>Shared prompts</h2>
    <div class="rows">
      ${Object.entries(state.prompts).map(
        ([name, text]) =>
          html`<p key=${name}>
            <b>${name}</b><small>${text.slice(0, 80)}</small
            ><button onClick=${() => store(name, "")} aria-label=${`Stop sharing ${name}`}>Remove</button>
          </p>`,
      )}
    </div>
    <form class="new" onSubmit=${share}>
      <input name="name" required maxlength="64" aria-label="Name of the prompt" placeholder="Name of this prompt" />
      <button class="main" disabled=${!system}>Share this chat’s system message</button>
      ${!system && html`<small>Write one in the settings first.</small>`}
    </form>`;
}
