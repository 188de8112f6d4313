/** HTTP operations that are kept while there is no network, and sent in order, each with an idempotency key. */

import { Listeners, backOffMs, bearer, pause } from "./cdc-common.js";

const DEFAULTS = {
  baseUrl: "", // what `/resource` is put behind
  key: "cdc-queue", // in localStorage; queues with different keys know nothing of each other
  maxOperations: 1_000,
  maxBytes: 4_000_000, // of localStorage's 5 million characters
  requestTimeoutMs: 30_000,
  minDelayMs: 1_000,
  maxDelayMs: 60_000,
};

const LEASE_MS = 60_000; // longer than a request may take: whoever has it asks again before each

/** There is no room for another operation; none was taken. */
export class QueueFull extends Error {
  name = "QueueFull";
}

/**
 * Every operation is an entry of localStorage of its own, so that tabs do not overwrite each other's; only one tab
 * sends. An operation is sent again until the server answers: at least once, with the same `Idempotency-Key`. (Another
 * tab may see a moment too late that it was sent, and send it once more: storage takes time between processes.)
 */
export class OfflineQueue {
  #options;
  #listeners = new Listeners();
  #sending = null; // the promise of a run of syncAll
  #halted = false; // the last run ended before everything was sent
  #failures = 0;
  #timer;
  #nextTryAt = null;
  #closed = new AbortController();

  constructor(options = {}) {
    this.#options = { storage: globalThis.localStorage, ...DEFAULTS, ...options };
    const { signal } = this.#closed;
    globalThis.addEventListener?.("online", () => this.#soon(0), { signal });
    globalThis.addEventListener?.("storage", ({ key }) => key?.startsWith(`${this.#options.key}:`) && this.#added(), {
      signal,
    });
    this.#soon(0);
  }

  /**
   * Keep an operation and, if there is a network, begin to send. It is stored when this returns.
   * url: default `baseUrl/resource`. Throws `QueueFull`, or a TypeError where `data` is no JSON.
   */
  queueOperation({ resource, action, method = "POST", data, url }) {
    const waiting = this.#read();
    const operation = {
      id: uuid(),
      ...{ resource, action, method, data, url: url ?? `${this.#options.baseUrl}/${resource}` },
      queuedAt: new Date().toISOString(),
      status: "pending",
    };
    const text = JSON.stringify(operation);
    const bytes = waiting.reduce((sum, entry) => sum + entry.text.length, text.length);
    if (waiting.length >= this.#options.maxOperations || bytes > this.#options.maxBytes) {
      throw new QueueFull(`the offline queue is full: ${waiting.length} operations, ${bytes} characters`);
    }
    try {
      this.#options.storage.setItem(this.#newKey(waiting), text);
    } catch (error) {
      throw new QueueFull("the browser's storage is full", { cause: error });
    }
    this.#added();
    return operation;
  }

  /** All operations, oldest first; `status` is `"pending"` or `"failed"`. */
  getQueue() {
    return this.#read().map(({ operation }) => operation);
  }

  getStats() {
    const queue = this.getQueue();
    const pending = queue.filter(({ status }) => status === "pending");
    return {
      pending: pending.length,
      failed: queue.length - pending.length,
      oldestAt: pending[0]?.queuedAt ?? null,
      isSyncing: this.#sending !== null,
      nextTryAt: this.#nextTryAt,
    };
  }

  /**
   * Send what is pending, now. Resolves with `{sent, failed, pending}` once all is sent or nothing more can be: no
   * network, 401, 408, 425, 429 or 5xx. Later tries follow by themselves, but after a 401: that needs another token.
   */
  syncAll() {
    clearTimeout(this.#timer);
    this.#nextTryAt = null;
    this.#sending ??= this.#alone(() => this.#send()).finally(() => {
      this.#sending = null;
      if (this.#halted) this.#changed();
      else this.#added(); // something may have come at the last moment
    });
    return this.#sending;
  }

  /** Forget operations that the server refused. */
  clearFailed() {
    for (const { key, operation } of this.#read()) {
      if (operation.status === "failed") this.#options.storage.removeItem(key);
    }
    this.#changed();
  }

  /** Let them be sent again, in their old places. */
  retryFailed() {
    for (const { key, operation } of this.#read()) {
      const { httpStatus, error, ...rest } = operation;
      if (operation.status === "failed") this.#write(key, { ...rest, status: "pending" });
    }
    this.#changed();
    this.#soon(0);
  }

  /** Take back one operation, pending or failed. One that is being sent may arrive all the same. */
  remove(id) {
    for (const { key, operation } of this.#read()) if (operation.id === id) this.#options.storage.removeItem(key);
    this.#changed();
  }

  /** `getStats()`, whenever it has changed (by this tab). */
  onChange(listener) {
    return this.#listeners.add("change", listener);
  }

  /** `{operation, response}`, after an operation was accepted. */
  onSent(listener) {
    return this.#listeners.add("sent", listener);
  }

  /** The operation, with `httpStatus` and `error`, after the server refused it. */
  onFailed(listener) {
    return this.#listeners.add("failed", listener);
  }

  /** Errors of listeners, and why sending stopped. */
  onError(listener) {
    return this.#listeners.add("error", listener);
  }

  /** Send nothing more from here; what is kept stays. */
  close() {
    this.#closed.abort();
    clearTimeout(this.#timer);
  }

  async #send() {
    const counts = { sent: 0, failed: 0 };
    this.#halted = false;
    let next;
    while (!this.#closed.signal.aborted && this.#renew() && (next = this.#firstPending())) {
      const outcome = await this.#sendOne(next);
      if (outcome === "later") break;
      counts[outcome] += 1;
      this.#failures = 0;
      this.#changed();
    }
    return { ...counts, pending: this.getStats().pending };
  }

  /** Returns `"sent"`, `"failed"` or `"later"`; for later, it has seen to the next try. */
  async #sendOne({ key, operation }) {
    const { method, url, data, id } = operation;
    let response;
    try {
      const headers = { "Idempotency-Key": id, ...(await bearer(this.#options.token)), ...this.#options.headers };
      if (data !== undefined) headers["Content-Type"] = "application/json";
      const signal = AbortSignal.any([this.#closed.signal, AbortSignal.timeout(this.#options.requestTimeoutMs)]);
      response = await fetch(url, { method, headers, body: JSON.stringify(data), signal });
    } catch (error) {
      return this.#later(error, null);
    }
    const { status } = response;
    if (status < 400) {
      this.#options.storage.removeItem(key);
      this.#listeners.call("sent", { operation, response });
      return "sent";
    }
    const error = (await response.text().catch(() => "")).slice(0, 500);
    if (status === 401) return this.#later(new Error(error), null, { again: false });
    if (status >= 500 || [408, 425, 429].includes(status)) return this.#later(new Error(error), response);
    const failed = { ...operation, status: "failed", httpStatus: status, error };
    // it may have been taken back meanwhile
    if (this.#options.storage.getItem(key) !== null) this.#write(key, failed);
    this.#listeners.call("failed", failed);
    return "failed";
  }

  #later(error, response, { again = true } = {}) {
    this.#failures += 1;
    this.#halted = true;
    this.#listeners.call("error", error);
    const wanted = retryAfterMs(response?.headers.get("Retry-After"));
    if (again) this.#soon(Math.max(wanted, backOffMs(this.#failures, this.#options)));
    return "later";
  }

  /** Something may be there to be sent. That is no reason to ask a server earlier than it wants. */
  #added() {
    this.#changed();
    if (this.#nextTryAt === null) this.#soon(0);
  }

  #soon(milliseconds) {
    clearTimeout(this.#timer);
    if (this.#closed.signal.aborted) return;
    this.#nextTryAt = milliseconds > 0 ? new Date(Date.now() + milliseconds) : null;
    this.#timer = setTimeout(() => {
      this.#nextTryAt = null;
      if (globalThis.navigator?.onLine !== false && this.#firstPending()) this.syncAll();
    }, milliseconds);
  }

  // --- one tab at a time -----------------------------------------------------------------------------------------

  /** Run it while no other tab does. Web Locks exist on https and localhost only; elsewhere a lease has to do. */
  async #alone(run) {
    const locks = globalThis.navigator?.locks;
    if (locks && !this.#options.lease) return locks.request(this.#options.key, run);
    while (!this.#closed.signal.aborted && !(await this.#lease())) await pause(1_000, this.#closed.signal);
    try {
      return await run();
    } finally {
      if (this.#holder() === this.#me) this.#options.storage.removeItem(this.#leaseKey);
    }
  }

  #me = uuid();

  get #leaseKey() {
    return `${this.#options.key}.lease`;
  }

  /** Write our name, and look a moment later whether it still stands there. */
  async #lease() {
    if (this.#holder() !== null) return false;
    this.#claim();
    await pause(100 + 100 * Math.random());
    return this.#holder() === this.#me;
  }

  /** Whether we may go on. (With Web Locks there is no lease.) */
  #renew() {
    const holder = this.#holder();
    if (holder === this.#me) this.#claim();
    return holder === null || holder === this.#me;
  }

  #claim() {
    this.#options.storage.setItem(this.#leaseKey, JSON.stringify({ holder: this.#me, until: Date.now() + LEASE_MS }));
  }

  #holder() {
    const { holder, until } = parse(this.#options.storage.getItem(this.#leaseKey)) ?? {};
    return until > Date.now() ? holder : null;
  }

  // --- entries of localStorage -----------------------------------------------------------------------------------

  /** Keys sort as the operations came, whatever the clock does. */
  #newKey(waiting) {
    const last = Number(waiting.at(-1)?.key.slice(this.#options.key.length + 1).split("-")[0] ?? 0);
    const number = Math.max(Date.now() * 1000, last + 1);
    return `${this.#options.key}:${String(number).padStart(17, "0")}-${uuid().slice(0, 8)}`;
  }

  #read() {
    const { storage, key: prefix } = this.#options;
    const keys = Array.from({ length: storage.length }, (_, i) => storage.key(i));
    return keys
      .filter((key) => key?.startsWith(`${prefix}:`))
      .sort()
      .map((key) => ({ key, text: storage.getItem(key) }))
      .map((entry) => ({ ...entry, operation: parse(entry.text) }))
      .filter(({ operation }) => operation);
  }

  #firstPending() {
    return this.#read().find(({ operation }) => operation.status === "pending");
  }

  #write(key, operation) {
    this.#options.storage.setItem(key, JSON.stringify(operation));
  }

  #changed() {
    this.#listeners.call("change", this.getStats());
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** Seconds or a date, in milliseconds from now; 0 where there is none. */
function retryAfterMs(value) {
  if (!value) return 0;
  const milliseconds = /^\d+$/.test(value) ? Number(value) * 1000 : Date.parse(value) - Date.now();
  return Number.isFinite(milliseconds) ? Math.max(0, milliseconds) : 0;
}

/** `crypto.randomUUID` is there on https and localhost only. */
function uuid() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}
