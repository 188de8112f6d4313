/** What the modules of the client share: requests, cursors, waiting, listeners. */

/** The server does not let us: 401 or 403. */
export class Refused extends Error {
  name = "Refused";
  constructor(status, error, hint) {
    super(error);
    this.status = status;
    this.hint = hint;
  }
}

/** Changes behind `since` are not kept any more, or it is of another feed. `cursor` goes on with what is left. */
export class Gap extends Error {
  name = "Gap";
  constructor(since, { error, oldest, cursor }) {
    super(error);
    Object.assign(this, { since, oldest, cursor });
  }

  /** Whether somebody who stands there has missed something. */
  concerns(cursor) {
    return isBeyond(this.cursor, cursor) || isBeyond(this.since, this.cursor);
  }
}

/** JSON from the server. Throws `Refused`, or an Error with the status and the server's hint. */
export async function request(url, options) {
  const response = await fetch(url, options);
  const body = await response.json().catch(() => ({}));
  if (response.ok) return body;
  const message = body.error ?? `${response.status} ${response.statusText}`;
  if (response.status === 401 || response.status === 403) throw new Refused(response.status, message, body.hint ?? "");
  throw Object.assign(new Error(message), { status: response.status, hint: body.hint ?? "", body });
}

/** One request to `GET /api/changes/poll`; `{changes, cursor, hasMore, timestamp}`. Throws `Gap` where there is one. */
export async function fetchChanges({ httpUrl, token, since, wait = 0, limit, signal, ...filters }) {
  const url = new URL(`${httpUrl}/api/changes/poll`);
  const parameters = { since, limit, wait: wait || undefined, ...filters };
  for (const [name, value] of Object.entries(parameters)) {
    const text = Array.isArray(value) ? value.join(",") : value;
    if (text !== undefined && text !== null && text !== "") url.searchParams.set(name, text);
  }
  // a request that nobody answers must not hold up the changes for ever
  const signals = [AbortSignal.timeout(wait * 1000 + 15_000), ...(signal ? [signal] : [])];
  try {
    return await request(url, { headers: await bearer(token), signal: AbortSignal.any(signals), cache: "no-store" });
  } catch (error) {
    if (error.status === 410) throw new Gap(since ?? "0", error.body);
    throw error;
  }
}

/** The header for a token, or for what a function gives as one. */
export async function bearer(token) {
  const found = typeof token === "function" ? await token() : token;
  return found ? { Authorization: `Bearer ${found}` } : {};
}

/** Where the service is: from one of the two addresses, or where the page came from. */
export function urls({ httpUrl, wsUrl }) {
  const sameServer = wsUrl && String(wsUrl).replace(/^ws/, "http").replace(/\/ws$/, "");
  const http = httpUrl ?? sameServer ?? globalThis.location?.origin;
  if (!http) throw new TypeError("wsUrl or httpUrl is needed where there is no page to take it from");
  const base = new URL(http, globalThis.location?.href).href.replace(/\/$/, "");
  return { httpUrl: base, wsUrl: wsUrl ?? `${base.replace(/^http/, "ws")}/ws` };
}

/** Cursors are decimal numbers of any length. `null` is before all. */
export function isBeyond(cursor, other) {
  if (other === null || other === undefined) return true;
  return cursor.length === other.length ? cursor > other : cursor.length > other.length;
}

export function smallest(cursors) {
  return cursors.reduce((least, cursor) => (isBeyond(least, cursor) ? cursor : least));
}

/** Resolves after that time, or when the signal is aborted. */
export function pause(milliseconds, signal) {
  if (signal?.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

/** How long to wait before the next try: a random time, up to a bound that doubles with every failure. */
export function backOffMs(failures, { minDelayMs, maxDelayMs }) {
  return Math.random() * Math.min(maxDelayMs, minDelayMs * 2 ** Math.min(failures, 16));
}

/** `Promise.withResolvers`, which is too young to count on. */
export function withResolvers() {
  let resolve, reject;
  const promise = new Promise((...both) => ([resolve, reject] = both));
  promise.catch(() => {}); // nobody has to wait for it
  return { promise, resolve, reject };
}

/** Functions by what they listen to. What they throw, now or later, goes to those of `"error"`. */
export class Listeners {
  #functions = new Map();

  /** Returns a function that removes it again. */
  add(what, listener) {
    if (!this.#functions.has(what)) this.#functions.set(what, new Set());
    this.#functions.get(what).add(listener);
    return () => this.remove(what, listener);
  }

  remove(what, listener) {
    this.#functions.get(what)?.delete(listener);
  }

  /** Call them; returns the promises of those that go on. */
  call(what, value) {
    const running = [];
    for (const listener of this.#functions.get(what) ?? []) {
      try {
        const result = listener(value);
        if (typeof result?.then === "function") {
          running.push(result.then(undefined, (error) => this.#failed(what, error)));
        }
      } catch (error) {
        this.#failed(what, error);
      }
    }
    return running;
  }

  #failed(what, error) {
    if (what === "error") console.error(error);
    else this.call("error", error);
  }
}

/** Cursors by channel, under a key of localStorage; without a key nothing is kept. */
export class SavedCursors {
  #key;
  #storage;
  #cursors = {};

  constructor({ storageKey, storage }) {
    this.#key = storageKey;
    if (!storageKey) return;
    this.#storage = storage ?? globalThis.localStorage;
    try {
      this.#cursors = JSON.parse(this.#storage.getItem(storageKey)) ?? {};
    } catch {
      // what cannot be read is worth nothing
    }
  }

  get(channel) {
    return this.#cursors[channel] ?? null;
  }

  forget(channel) {
    delete this.#cursors[channel];
    this.save({});
  }

  save(cursors) {
    for (const [channel, cursor] of Object.entries(cursors)) if (cursor !== null) this.#cursors[channel] = cursor;
    this.#storage?.setItem(this.#key, JSON.stringify(this.#cursors));
  }
}

/** `"*"` is every event of every channel. (Without the colon it would be the name of a listener of our own.) */
export function patternKey(pattern) {
  if (pattern === "*") return "*:*";
  if (!pattern.includes(":")) throw new TypeError(`listen to "${pattern}:*", or to "*"`);
  return pattern;
}
