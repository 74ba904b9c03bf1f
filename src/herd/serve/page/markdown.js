// Markdown to elements. No HTML is ever parsed: marked splits the text into tokens, and each becomes an element
// from the table below with its text as text. HTML that a model writes is shown as it was written.
import { lexer } from "./vendor/marked.esm.js";
import highlighter from "./vendor/highlight.js";
import bash from "./vendor/languages/bash.js";
import cpp from "./vendor/languages/cpp.js";
import javascript from "./vendor/languages/javascript.js";
import json from "./vendor/languages/json.js";
import python from "./vendor/languages/python.js";
import xml from "./vendor/languages/xml.js";
import yaml from "./vendor/languages/yaml.js";

const LANGUAGES = { bash, cpp, javascript, json, python, xml, yaml };
for (const name in LANGUAGES) highlighter.registerLanguage(name, LANGUAGES[name]);
highlighter.registerAliases(["ts", "typescript", "tsx"], { languageName: "javascript" });
// Nearly right
highlighter.registerAliases(["c", "cs", "csharp", "go", "h", "java", "kotlin", "rust"], { languageName: "cpp" });
// Characters: more takes longer than a few frames
const MAX_HIGHLIGHTED = 10_000;

const ENTITIES = {
  amp: "&",
  lt: "<",
  gt: ">",
  quot: '"',
  apos: "'",
  nbsp: "\u00a0",
  hellip: "…",
  ndash: "–",
  mdash: "—",
};
const decode = (text) =>
  text.replace(/&(?:#(\d{1,6})|(\w+));/g, (all, code, name) =>
    code ? String.fromCodePoint(Math.min(code, 0x10ffff) || 0xfffd) : (ENTITIES[name] ?? all),
  );

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const all = (tokens) => tokens.map((token) => (DRAW[token.type] ?? DRAW.text)(token));
const wrap = (tag) => (token) => make(tag, {}, ...all(token.tokens));

function link({ href, title }, ...children) {
  if (!/^(https?|mailto):/i.test(href)) return make("span", {}, ...children);
  return make("a", { href, title: title || href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

const DRAW = {
  space: () => "",
  def: () => "",
  br: () => make("br"),
  hr: () => make("hr"),
  text: (token) => (token.tokens ? make("span", {}, ...all(token.tokens)) : decode(token.text ?? token.raw)),
  escape: ({ text }) => text,
  html: ({ text }) => (/^<br ?\/?>\s*$/i.test(text) ? make("br") : text),
  strong: wrap("strong"),
  em: wrap("em"),
  del: wrap("del"),
  paragraph: wrap("p"),
  blockquote: wrap("blockquote"),
  // The page itself has the h1
  heading: (token) => wrap(`h${Math.min(6, token.depth + 1)}`)(token),
  codespan: ({ text }) => make("code", {}, text),
  checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  link: (token) => link(token, ...all(token.tokens)),
  // Never loaded
  image: (token) => link(token, `${token.text || "image"} ↗`),
  list: ({ ordered, start, items }) =>
    make(
      ordered ? "ol" : "ul",
      ordered ? { start } : {},
      ...items.map((item) => make("li", {}, ...all(item.tokens))),
    ),
  table: ({ header, rows }) => {
    const row = (tag) => (cells) =>
      make("tr", {}, ...cells.map(({ tokens, align }) => make(tag, { align: align ?? "" }, ...all(tokens))));
    const table = make(
      "table",
      {},
      make("thead", {}, row("th")(header)),
      make("tbody", {}, ...rows.map(row("td"))),
    );
    return make("div", { className: "scroll", tabIndex: 0 }, table);
  },
  code: ({ text, lang }) => {
    const language = lang?.match(/^[\w+#.-]*/)[0].toLowerCase() ?? "";
    const copy = make("button", { type: "button", textContent: "Copy" });
    copy.dataset.copy = "code";
    const code = make("code", {}, text);
    code.dataset.language = language;
    return make(
      "figure",
      {},
      make("figcaption", {}, language || "text", copy),
      make("pre", { tabIndex: 0 }, code),
    );
  },
};

// Returns the nodes of highlight.js's tree, whose leaves are text.
const spans = ({ children }) =>
  children.map((node) =>
    node.children ? make("span", { className: `hl-${(node.scope ?? "").split(".")[0]}` }, ...spans(node)) : node,
  );

const idle = globalThis.requestIdleCallback ?? ((work) => setTimeout(work, 50));
async function highlight(code) {
  const { language } = code.dataset;
  if (language === "diff" && !highlighter.getLanguage(language))
    highlighter.registerLanguage(language, (await import("./vendor/languages/diff.js")).default);
  if (!highlighter.getLanguage(language) || code.textContent.length > MAX_HIGHLIGHTED) return;
  idle(() => {
    if (!code.isConnected) return;
    code.replaceChildren(...spans(highlighter.highlight(code.textContent, { language })._emitter.rootNode));
  });
}

// Draws a growing text into an element, block by block: only the last block, which may still change, is drawn again.
export class Blocks {
  constructor(element) {
    Object.assign(this, { element, raws: [], start: 0, finished: 0, text: "", isFinal: false });
  }

  update(raw, isFinal) {
    const text = raw.replaceAll("\r", "");
    if (text === this.text && isFinal === this.isFinal) return;
    if (isFinal || !text.startsWith(this.text)) this.start = this.finished = 0;
    const tokens = this.#split(text.slice(this.start));
    // [name]: address, for earlier blocks too
    const hasLinks = isFinal && Object.keys(tokens.links ?? {}).length > 0;
    let index = this.finished;
    let position = this.start;
    const last = tokens.findLast(({ type }) => type !== "space");
    for (const token of tokens) {
      if (token.type !== "space") {
        if (!isFinal) [this.start, this.finished] = [position, index];
        this.#draw(index++, token, hasLinks, isFinal || token !== last);
      }
      position += token.raw.length;
    }
    while (this.element.children.length > index) this.element.lastChild.remove();
    this.raws.length = index;
    Object.assign(this, { text, isFinal });
  }

  #split(text) {
    try {
      return lexer(text, { gfm: true, breaks: true });
    } catch {
      // Nested too deeply
      return [{ type: "code", raw: text, text }];
    }
  }

  #draw(index, token, always, isComplete) {
    const state = token.raw.trimEnd() + isComplete;
    if (this.raws[index] === state && !always) return;
    this.raws[index] = state;
    const block = this.element.children[index] ?? this.element.appendChild(document.createElement("div"));
    block.replaceChildren(...all([token]));
    if (isComplete) block.querySelectorAll("pre > code").forEach(highlight);
  }
}
