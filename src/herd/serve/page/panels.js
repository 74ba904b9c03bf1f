// What is around the messages: the list of chats, the models, the search, the meter of the context.
import { change, currentTurns, deleteChat } from "./chat.js";
import { $, icon, number, state } from "./state.js";
import { html } from "./vendor/preact.js";

const short = (count, digits = 2) =>
  count.toLocaleString("en", { notation: "compact", maximumSignificantDigits: digits }).replace("K", "k");

const DAY = 86_400_000;
const AGES = [
  ["Today", 0],
  ["Yesterday", 1],
  ["Last 7 days", 7],
  ["Last 30 days", 30],
  ["Older", Infinity],
];

export function Chats() {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const ageOf = (chat) => AGES.find(([, days]) => chat.updated >= midnight - days * DAY)[0];
  let age;
  return state.chats.map((chat) => {
    const heading = ageOf(chat) !== age && html`<h2>${(age = ageOf(chat))}</h2>`;
    const isCurrent = chat.id === state.chat?.id;
    return html`${heading}
      <div class="chat" key=${chat.id}>
        <a href=${`#${chat.id}`} aria-current=${isCurrent ? "page" : null}>${chat.title}</a>
        <button
          class="quiet"
          aria-label=${`Delete ${chat.title}`}
          title="Delete"
          onClick=${() => deleteChat(chat)}
        >
          ${icon("bin")}
        </button>
      </div>`;
  });
}

// The model of the chat. With several models: a choice, and a second one to answer beside it.
export function Models() {
  const { models, chat } = state;
  const chosen = chat?.models ?? [];
  const choose = (lane) => (event) => {
    const { value } = event.target;
    change({ models: lane ? [chosen[0], ...(value ? [value] : [])] : [value, ...chosen.slice(1)] });
  };
  const options = (lane) =>
    models.map(({ id }) => html`<option value=${id} selected=${chosen[lane] === id}>${id}</option>`);
  const one = html`<button class="quiet name" data-do="card" title="About this model">
    <span>${chosen[0]}</span>${icon("info")}
  </button>`;
  if (models.length < 2) return chosen[0] && one;
  return html`<select aria-label="Model" onChange=${choose(0)}>
      ${options(0)}
    </select>
    <select aria-label="Second model, beside the first" onChange=${choose(1)}>
      <option value="" selected=${!chosen[1]}>compare with…</option>
      ${options(1)}
    </select>
    <button class="quiet" data-do="card" aria-label="About this model" title="About this model">
      ${icon("info")}
    </button>`;
}

// What the server says about the models of the chat.
export function Card() {
  const chosen = state.models.filter(({ id }) => state.chat?.models.includes(id));
  return html`<button class="quiet close" data-do="card" aria-label="Close">${icon("close")}</button> ${chosen.map(
      (model, index) => {
        const { n_params, n_vocab, n_ctx_train, stage, licence, parents, evals, created_by, weights_hash } =
          model.meta ?? {};
        const rows = {
          Parameters: n_params && short(n_params, 3),
          Context:
            model.max_model_len &&
            `${number(model.max_model_len)} tokens${n_ctx_train > model.max_model_len ? ` of ${number(n_ctx_train)}` : ""}`,
          Vocabulary: n_vocab && `${number(n_vocab)} tokens`,
          Stage: stage,
          Parents: parents && Object.keys(parents).join(", "),
          Licence: licence,
          "Made by": created_by,
          Weights: weights_hash?.slice(0, 16),
          ...Object.fromEntries(
            Object.entries(evals ?? {}).map(([name, value]) => [
              name,
              typeof value === "number" ? value.toPrecision(4) : JSON.stringify(value),
            ]),
          ),
          "Also called": model.aliases?.join(", "),
        };
        return html`<h2 id=${index ? null : "card-title"}>${model.id}</h2>
          <dl>
            ${Object.entries(rows).map(
              ([name, value]) =>
                value &&
                html`<dt>${name}</dt>
                  <dd>${value}</dd>`,
            )}
          </dl>`;
      },
    )}`;
}

export function Results() {
  return state.results.map(
    ({ chat, id, excerpt }) =>
      html`<a class="result" href=${`#${chat.id}`} data-place=${id}>
        ${excerpt ? html`${excerpt}<span>${chat.title}</span>` : html`<b>${chat.title}</b>`}</a
      >`,
  );
}

// How much of the context the chat fills, the draft included. A text has about four characters per token.
export function Meter() {
  const { chat, models } = state;
  if (!chat) return null;
  const limit = models.find(({ id }) => id === chat.models[0])?.max_model_len;
  const messages = currentTurns().turns.flatMap(({ user, lanes }) => [user, ...lanes[0]]);
  const last = messages.findLast(({ usage }) => usage);
  const unknown = last ? state.files : [...messages, ...state.files];
  const pending = unknown.reduce(
    (sum, { content, text }) => sum + (content ?? text).length,
    $("draft").value.length,
  );
  // With tools on the server, the usage is the sum of steps, and the last one has read all before it
  const { prompt_tokens: read, completion_tokens: written } = last?.herd?.steps?.at(-1) ?? last?.usage ?? {};
  const tokens = (read ?? 0) + (written ?? 0) + Math.ceil(pending / 4);
  if (!limit) return null;
  const part = Math.min(1, tokens / limit);
  const text = `About ${number(tokens)} of ${number(limit)} tokens of the context are used`;
  return html`<span
    class=${part > 0.9 ? "full" : ""}
    role="meter"
    aria-label="Context used"
    aria-valuemin="0"
    aria-valuemax=${limit}
    aria-valuenow=${Math.min(tokens, limit)}
    aria-valuetext=${text}
    title=${text}
  >
    <svg viewBox="0 0 20 20" aria-hidden="true">
      <circle cx="10" cy="10" r="7" />
      <circle cx="10" cy="10" r="7" pathLength="100" stroke-dasharray=${`${100 * part} 100`} />
    </svg>
    ${short(tokens)} / ${short(limit)}</span
  >`;
}

// Switches for the tools on the server, one for each group.
export function ServerTools() {
  const { tools, chat } = state;
  if (!tools.length || !chat) return null;
  const groups = [...new Set(tools.map(({ group }) => group))];
  const used = (chat.settings.use ?? "").split(",").filter((name) => groups.includes(name));
  const toggle = (name) => {
    const use = used.includes(name) ? used.filter((each) => each !== name) : [...used, name];
    const { use: _, ...settings } = chat.settings;
    change({ settings: use.length ? { ...settings, use: use.join(",") } : settings });
  };
  return html`<details class="toolbox">
    <summary class=${used.length ? "used" : ""} title="Tools that the server runs">
      ${icon("tool")}${used.length ? used.join(", ") : "Tools"}
    </summary>
    <fieldset>
      <legend>The model may use, on the server</legend>
      ${groups.map(
        (name) =>
          html`<label class="check"
            ><input type="checkbox" checked=${used.includes(name)} onChange=${() => toggle(name)} />
            <span>${name}<small>${tools.find(({ group }) => group === name).description}</small></span></label
          >`,
      )}
    </fieldset>
  </details>`;
}

// A choice of shared system messages.
export function Prompts() {
  const names = Object.keys(state.prompts);
  if (!names.length) return null;
  const pick = ({ target }) => {
    const field = $("settings").elements.system;
    field.value = state.prompts[target.value] ?? field.value;
    field.dispatchEvent(new Event("input", { bubbles: true }));
    target.value = "";
  };
  return html`<label class="wide"
    >Shared prompts<select onChange=${pick}>
      <option value="">Use one as the system message…</option>
      ${names.map((name) => html`<option value=${name}>${name}</option>`)}
    </select></label
  >`;
}

export function Files() {
  return state.files.map(
    (file) =>
      html`<span class="chip"
        >${icon("file")}${file.name}<small>${number(file.text.length)} characters</small>
        <button type="button" class="quiet" aria-label=${`Remove ${file.name}`} onClick=${file.remove}>
          ${icon("close")}
        </button></span
      >`,
  );
}
