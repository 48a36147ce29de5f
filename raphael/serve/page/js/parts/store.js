// The last images, kept by the browser (IndexedDB) until they are cleared; in memory alone where it keeps nothing.

const NAME = "raphael";
const MOST = 60;

export const images = []; // newest first: {key, kind, model, prompt, values, png, seconds}
export const kept = new EventTarget(); // "change"

let database = null;

/** Reads what was kept. Resolves always: a browser that keeps nothing has no history. */
export async function openStore() {
  database = await opened().catch(() => null);
  const found = database ? await asked("readonly", (store) => store.getAll()).catch(() => []) : [];
  images.splice(0, images.length, ...found.reverse());
  kept.dispatchEvent(new Event("change"));
}

/** Adds an image as the newest and resolves with it; the oldest beyond MOST go. */
export async function keep(image) {
  const { key, ...rest } = image;
  images.unshift(rest);
  const old = images.splice(MOST);
  kept.dispatchEvent(new Event("change"));
  if (!database) return rest;
  rest.key = await asked("readwrite", (store) => store.add(rest)).catch(() => undefined);
  for (const { key: gone } of old)
    if (gone !== undefined) asked("readwrite", (store) => store.delete(gone)).catch(() => {});
  return rest;
}

export async function clear() {
  images.splice(0);
  kept.dispatchEvent(new Event("change"));
  if (database) await asked("readwrite", (store) => store.clear()).catch(() => {});
}

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("images", { keyPath: "key", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    request.onblocked = () => reject(new Error("blocked"));
  });
}

function asked(mode, ask) {
  return new Promise((resolve, reject) => {
    const request = ask(database.transaction("images", mode).objectStore("images"));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
