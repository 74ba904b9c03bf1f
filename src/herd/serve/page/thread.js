// The messages of the open chat.
import { answerAgain, change, currentTurns, isOpen, leaveOutOldest, onText, send, sendResults } from "./chat.js";
import { Blocks } from "./markdown.js";
import { icon, number, set, state } from "./state.js";
import { slotOf } from "./tree.js";
import { Component, html } from "./vendor/preact.js";

// Turns that are drawn at once; earlier ones follow when the user scrolls up
const STEP = 5;

export function Thread() {
  const { chat } = state;
  if (!chat) return null;
  const { turns, slots } = currentTurns();
  if (!turns.length) return html`<${Welcome} />`;
  const first = Math.max(0, turns.length - (state.drawn ?? STEP));
  const start = turns.findIndex(({ user }) => user.id === chat.start);
  const earlier = () => set({ drawn: (state.drawn ?? STEP) + STEP });
  return html`
    ${first > 0 && html`<button class="earlier" ref=${(node) => watchTop(node, earlier)} onClick=${earlier}>Earlier messages</button>`}
    ${turns.slice(first).map(({ user, lanes }, index) => {
      const messages = [user, ...lanes.flat()];
      const places = messages.map((message) => {
        const all = slots.get(slotOf(message));
        return [all.indexOf(message), all.length, isOpen(message)];
      });
      const mark = JSON.stringify([places, chat.models, first + index - start]);
      return html`<${Turn}
        key=${user.id}
        ...${{ user, lanes, messages, mark, slots }}
        begins=${first + index === start && start > 0}
      />`;
    })}
  `;
}

// Calls `reached` when a node comes near the view.
let watcher;
function watchTop(node, reached) {
  watcher?.disconnect();
  if (!node) return;
  watcher = new IntersectionObserver(([entry]) => entry.isIntersecting && reached(), { rootMargin: "800px" });
  watcher.observe(node);
}

function Welcome() {
  const [model] = state.models;
  return html`<div class="welcome">
    <h2>${model ? "What is on your mind?" : "No model yet"}</h2>
    <p>
      ${model ? html`You are talking to <b>${state.chat.models.join(" and ")}</b>.` : "Sign in to see the models of this server."}
    </p>
  </div>`;
}

// A user's message with its answers. It is drawn again only if one of them has changed.
class Turn extends Component {
  shouldComponentUpdate(next) {
    return (
      next.mark !== this.props.mark ||
      next.messages.some((message, index) => message !== this.props.messages[index])
    );
  }

  render({ user, lanes, slots, begins }) {
    const chains = lanes.slice(0, Math.max(lanes[1].length && 2, 1));
    return html`<article class="turn">
      ${begins && html`<p class="cut">Messages above this line are not sent to the model.</p>`}
      <${UserMessage} message=${user} slots=${slots} />
      <div class=${chains.length > 1 ? "beside" : ""}>
        ${chains.map(
          (chain) =>
            html`<div class="lane">
              ${chain.map(
                (message, index) =>
                  message.role === "assistant" &&
                  html`<${Answer}
                    key=${message.id}
                    message=${message}
                    results=${chain[index + 1]?.results}
                    named=${chains.length > 1}
                    slots=${slots}
                  />`,
              )}
            </div>`,
        )}
      </div>
    </article>`;
  }
}

class UserMessage extends Component {
  render({ message, slots }, { editing }) {
    const stopEditing = () => this.setState({ editing: false });
    if (editing) {
      const submit = (event) => {
        event.preventDefault();
        stopEditing();
        send(event.target.elements.text.value, message.files ?? [], message.parent);
      };
      const keys = (event) => {
        if (event.key === "Escape") (event.stopPropagation(), stopEditing());
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing)
          (event.preventDefault(), event.target.form.requestSubmit());
      };
      return html`<form class="user edit" onSubmit=${submit}>
        <textarea
          name="text"
          aria-label="Your message"
          rows=${Math.min(12, message.content.split("\n").length + 1)}
          onKeyDown=${keys}
          ref=${(node) => node && !node.value && ((node.value = message.content), node.focus())}
        ></textarea>
        <p class="actions">
          <small>The old message stays as a branch.</small>
          <button type="button" onClick=${stopEditing}>Cancel</button><button class="main">Send</button>
        </p>
      </form>`;
    }
    return html`<div class="user">
      ${message.files?.map(
        ({ name, text }) =>
          html`<details class="file">
            <summary>${icon("file")}${name}<small>${number(text.length)} characters</small></summary>
            <pre tabindex="0">${text}</pre>
          </details>`,
      )}
      ${message.content && html`<div class="bubble">${message.content}</div>`}
      <div class="tools">
        <${Siblings} message=${message} slots=${slots} />
        <${CopyButton} text=${message.content} />
        <button
          class="quiet"
          data-edit
          aria-label="Edit"
          title="Edit"
          onClick=${() => this.setState({ editing: true })}
        >
          ${icon("edit")}
        </button>
      </div>
    </div>`;
  }
}

const CopyButton = ({ text }) =>
  html`<button class="quiet" data-copy="text" data-text=${text} aria-label="Copy" title="Copy">
    ${icon("copy")}
  </button>`;

function Siblings({ message, slots }) {
  const all = slots.get(slotOf(message));
  const index = all.indexOf(message);
  const go = (to) => change({ chosen: { ...state.chat.chosen, [slotOf(message)]: all[to].id } });
  if (all.length < 2) return null;
  return html`<span class="siblings">
    <button class="quiet" aria-label="Previous version" disabled=${!index} onClick=${() => go(index - 1)}>
      ${icon("left")}
    </button>
    ${index + 1}/${all.length}
    <button
      class="quiet"
      aria-label="Next version"
      disabled=${index === all.length - 1}
      onClick=${() => go(index + 1)}
    >
      ${icon("right")}
    </button>
  </span>`;
}

class Answer extends Component {
  componentDidMount() {
    this.blocks = new Blocks(this.text);
    this.draw();
  }

  componentDidUpdate() {
    this.draw();
  }

  draw() {
    const { message } = this.props;
    const began = performance.now();
    this.blocks.update(message.content, !isOpen(message));
    this.pause = (performance.now() - began) * 3;
    onText(message, () => this.soon());
  }

  // Draws once in the next frame, and less often if drawing takes long.
  soon() {
    if (this.waiting) return;
    this.waiting = true;
    const paint = () => {
      this.waiting = false;
      this.setState({});
    };
    setTimeout(document.hidden ? paint : () => requestAnimationFrame(paint), this.pause);
  }

  render({ message, results, named, slots }) {
    const { content, reasoning, calls, steps, problem, herd } = message;
    const writing = isOpen(message);
    return html`<div class="answer" aria-busy=${writing}>
      ${named && html`<h3>${message.model}</h3>`}
      ${
        reasoning &&
        html`<details class="thought" open=${writing && !content}>
          <summary>Reasoning</summary>
          <div>${reasoning}</div>
        </details>`
      }
      ${steps?.map((step) => html`<${StepCard} ...${step} />`)}
      <div class="text" ref=${(node) => (this.text = node)}></div>
      ${writing && !content && !reasoning && !calls && !steps && html`<p class="waiting">Reading the prompt<i></i><i></i><i></i></p>`}
      ${calls && html`<${Tools} ...${{ message, calls, results, writing }} />`}
      ${problem && html`<${Trouble} message=${message} problem=${problem} />`}
      ${!writing && !problem && html`<${Ending} message=${message} />`}
      ${herd?.warnings?.map((warning) => html`<p class="note">${warning}</p>`)}
      <div class="tools">
        ${
          !writing &&
          html`<${Siblings} message=${message} slots=${slots} />
            ${content && html`<${CopyButton} text=${content} />`}
            ${!problem && html`<button class="quiet" aria-label="Answer again" title="Answer again" onClick=${() => answerAgain(message)}>${icon("again")}</button>`}`
        }
        <span class="stats" title=${settingsOf(message)}
          >${statsOf(message)
            .slice(0, writing ? 1 : 9)
            .join(" · ")}</span
        >
      </div>
    </div>`;
  }
}

// A call that the server has run, or is running, with its result.
function StepCard({ name, arguments: given, content, ok }) {
  const known = content !== undefined;
  const isProgram = name === "code_interpreter";
  const result = isProgram && known ? printed(content) : content;
  return html`<details class=${known && !ok ? "step failed" : "step"}>
    <summary>
      ${icon("tool")}<code>${name}</code>
      <small>${known ? result.replace(/\s+/g, " ").slice(0, 60) : "running on the server…"}</small>
    </summary>
    <h5>${isProgram ? "Program" : "Arguments"}</h5>
    <pre tabindex="0">${program(given)}</pre>
    ${
      known &&
      html`<h5>${!ok ? "Error" : isProgram ? "Output" : "Result"}</h5>
        <pre tabindex="0">${result}</pre>`
    }
  </details>`;
}

// Returns what a program printed. The model reads it after "completed" or "failed", and between tags.
function printed(content) {
  const parts = /^(?:completed|failed)(?:\n\[stdout\]([^]*?)\[\/stdout\])?(?:\n\[stderr\]([^]*?)\[\/stderr\])?$/.exec(content);
  if (!parts) return content;
  return parts.slice(1).filter(Boolean).join("\n").trim() || "The program printed nothing.";
}

// Returns a program that was run as it is, and other arguments as JSON.
function program(text) {
  const [only, ...others] = Object.values(parsed(text) ?? {});
  return others.length || typeof only !== "string" ? pretty(text) : only;
}

// Returns JSON in lines, or what there is of it while it is written.
function pretty(text) {
  const value = parsed(text);
  return value === undefined ? text : JSON.stringify(value, null, 2);
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function Ending({ message: { end, settings, calls, content } }) {
  const limit = settings?.max_tokens
    ? `The answer reached its limit of ${number(settings.max_tokens)} tokens. Raise “Longest answer” in the settings, then answer again.`
    : "The answer reached the end of the context. Start a new chat, or leave out earlier messages.";
  const note = { length: limit, stopped: "Stopped." }[end] ?? (end ? "" : "This answer was interrupted.");
  const empty = !note && !content && !calls ? "The model ended its answer at once." : "";
  return (note || empty) && html`<p class="note">${note || empty}</p>`;
}

function Trouble({ message, problem: { text, status, code, cure, wait } }) {
  return html`<div class="problem" role="alert">
    <p><b>${text}</b></p>
    <p>${cure}${wait > 0 && ` The server asks to wait ${number(wait)} s.`}</p>
    <p class="actions">
      ${code === "context_length_exceeded" && html`<button onClick=${() => leaveOutOldest(message)}>Leave out the oldest messages</button>`}
      ${[401, 403].includes(status) && html`<button data-do="sign-in">Sign in</button>`}
      <button onClick=${() => answerAgain(message)}>Try again</button>
    </p>
  </div>`;
}

// Cards of an answer's tool calls. The user writes results that are not there yet.
function Tools({ message, calls, results, writing }) {
  const submit = (event) => {
    event.preventDefault();
    const texts = new FormData(event.target).getAll("result");
    sendResults(
      message,
      calls.map(({ id, name }, index) => ({ id, name, content: texts[index] })),
    );
  };
  const asks = !results && !writing;
  return html`<form class="calls" onSubmit=${submit}>
    ${calls.map(
      (call, index) =>
        html`<section class="card">
          <h4>${icon("tool")}<code>${call.name}</code></h4>
          <pre tabindex="0" aria-label="Arguments">${pretty(call.arguments)}</pre>
          ${
            results?.[index] &&
            html`<h5>Result</h5>
              <pre tabindex="0">${results[index].content}</pre>`
          }
          ${asks && html`<label>Result<textarea name="result" rows="2" required placeholder=${`What ${call.name} returns`}></textarea></label>`}
        </section>`,
    )}
    ${asks && html`<p class="actions"><button class="main">Send ${calls.length > 1 ? "results" : "result"}</button></p>`}
  </form>`;
}

// Returns what is known about the speed, size and cost of an answer. The first is also shown while it is written.
function statsOf({ usage, timings, herd, pieces, firstSeconds, seconds, created }) {
  const elapsed = (seconds ?? (Date.now() - created) / 1000) - firstSeconds;
  const rate = timings?.predicted_per_second || (pieces > 5 && elapsed > 0.3 && (pieces - 1) / elapsed);
  const stats = [];
  if (rate) stats.push(`${rate < 10 ? rate.toFixed(1) : number(Math.round(rate))} tokens/s`);
  if (firstSeconds) stats.push(`first after ${firstSeconds.toFixed(2)} s`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    stats.push(`${number(usage.completion_tokens)} tokens`);
    stats.push(`prompt ${number(usage.prompt_tokens)}${cached ? `, ${number(cached)} cached` : ""}`);
  }
  if (herd?.cost) stats.push(`${herd.cost.amount} ${herd.cost.currency}`);
  return stats;
}

const settingsOf = ({ model, settings }) =>
  [model, ...Object.entries(settings ?? {}).map(([name, value]) => `${name} ${value}`)].join("\n");
