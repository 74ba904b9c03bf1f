// A chat is a tree of messages. An edit or a new answer adds a sibling, and `chosen` says which one is shown.
//
// The children of a message are in slots: "ID/user" has the user's next messages, "ID/0" and "ID/1" the answers
// of the first and of the second model. A tool's results follow the answer that called it, and have its lane.
// The next turn continues from the first lane.

export const slotOf = (message) => `${message.parent}/${message.role === "user" ? "user" : message.lane}`;

// Returns the shown turns, {user, lanes: [messages, messages]}, the id from which the next one continues, and all
// messages by slot.
export function readTurns(messages, chosen) {
  const slots = new Map();
  for (const message of messages) {
    const slot = slotOf(message);
    if (!slots.has(slot)) slots.set(slot, []);
    slots.get(slot).push(message);
  }
  const pick = (slot) => slots.get(slot)?.find(({ id }) => id === chosen[slot]) ?? slots.get(slot)?.at(-1);
  const turns = [];
  let end = "";
  for (let user; (user = pick(`${end}/user`));) {
    const lanes = [0, 1].map((lane) => {
      const chain = [];
      for (let last = user; (last = pick(`${last.id}/${lane}`));) chain.push(last);
      return chain;
    });
    turns.push({ user, lanes });
    end = (lanes[0].at(-1) ?? user).id;
  }
  return { turns, end, slots };
}

// Returns `chosen` changed so that a message and all before it are shown.
export function reveal(messages, chosen, id) {
  const byId = new Map(messages.map((message) => [message.id, message]));
  const changed = { ...chosen };
  for (let message = byId.get(id); message; message = byId.get(message.parent))
    changed[slotOf(message)] = message.id;
  return changed;
}

// Returns the user's text with the attached files, each in a fence longer than any in it.
export function fullText({ content, files = [] }) {
  const parts = files.map(({ name, text }) => {
    const longest = Math.max(2, ...Array.from(text.matchAll(/`{3,}/g), ([run]) => run.length));
    const fence = "`".repeat(longest + 1);
    return `${name}:\n${fence}\n${text}\n${fence}`;
  });
  return [content, ...parts].filter(Boolean).join("\n\n");
}

// Returns the messages for the server that come before the answer `target`. `start`: the first turn that is sent.
export function promptFor(turns, target, system, start) {
  const prompt = system ? [{ role: "system", content: system }] : [];
  const first = turns.findIndex(({ user }) => user.id === start);
  for (const { user, lanes } of turns.slice(Math.max(first, 0))) {
    prompt.push({ role: "user", content: fullText(user) });
    for (const message of lanes[target.lane].length ? lanes[target.lane] : lanes[0]) {
      if (message.id === target.id) return prompt;
      for (const { id, content } of message.results ?? [])
        prompt.push({ role: "tool", tool_call_id: id, content });
      if (message.role !== "assistant" || !(message.content || message.calls || message.steps)) continue;
      const calls = message.calls?.map(({ id, name, arguments: text }) => ({
        id,
        type: "function",
        function: { name, arguments: text },
      }));
      const steps = message.steps && { herd_steps: message.steps };
      prompt.push({ role: "assistant", content: message.content, ...steps, ...(calls && { tool_calls: calls }) });
    }
    if (user.id === target.parent) return prompt;
  }
  return prompt;
}
