// Chats in this browser's IndexedDB: "chats" has one record per chat, "messages" one per message.

const opened = new Promise((resolve, reject) => {
  const request = indexedDB.open("herd", 1);
  request.onupgradeneeded = () => {
    request.result.createObjectStore("chats", { keyPath: "id" });
    request.result.createObjectStore("messages", { keyPath: "id" }).createIndex("chat", "chat");
  };
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

// Runs `work` in a transaction over both stores. Resolves with the result of the request it returns, once stored.
async function within(mode, work) {
  const transaction = (await opened).transaction(["chats", "messages"], mode);
  const request = work(transaction.objectStore("chats"), transaction.objectStore("messages"));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

const byTime = (a, b) => a.created - b.created;

export const listChats = async () =>
  (await within("readonly", (chats) => chats.getAll())).sort((a, b) => b.updated - a.updated);

export const readMessages = async (chat) =>
  (await within("readonly", (_, messages) => messages.index("chat").getAll(chat))).sort(byTime);

export const write = (chats, messages = []) =>
  within("readwrite", (chatStore, messageStore) => {
    for (const chat of chats) chatStore.put(chat);
    for (const message of messages) messageStore.put(message);
  });

export const erase = (id) =>
  within("readwrite", (chats, messages) => {
    chats.delete(id);
    messages.index("chat").openKeyCursor(id).onsuccess = ({ target: { result } }) => {
      if (!result) return;
      messages.delete(result.primaryKey);
      result.continue();
    };
  });

// Returns up to `limit` places where all words occur: in the title of a chat, or in one of its messages.
export async function search(query, chats, limit = 30) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (text) => words.every((word) => text.toLowerCase().includes(word));
  const places = [];
  if (!words.length) return chats.slice(0, limit).map((chat) => ({ chat }));
  for (const chat of chats) if (matches(chat.title)) places.push({ chat });
  const known = new Map(chats.map((chat) => [chat.id, chat]));
  await within("readonly", (_, messages) => {
    messages.openCursor().onsuccess = ({ target: { result } }) => {
      if (!result || places.length >= limit) return;
      const { id, chat, content, files = [] } = result.value;
      const text = [content, ...files.map((file) => file.text)].join("\n");
      if (known.has(chat) && matches(text)) {
        const at = Math.max(0, text.toLowerCase().indexOf(words[0]) - 40);
        places.push({ chat: known.get(chat), id, excerpt: (at ? "…" : "") + text.slice(at, at + 140) });
      }
      result.continue();
    };
  });
  return places;
}
