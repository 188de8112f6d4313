/**
 * Realtime changes from cdc, for browsers and Node 22+. No dependencies; types are in cdc-client.d.ts.
 *
 * Every channel has a cursor, which moves on once the listeners of an event have run. Whatever happens to the
 * connection, the channel goes on behind its cursor: no event is lost, none comes twice, and they come in order.
 */

import { PollConnection, SocketConnection, asEvent } from "./cdc-connections.js";
import {
  Gap,
  Listeners,
  Refused,
  SavedCursors,
  backOffMs,
  bearer,
  fetchChanges,
  isBeyond,
  patternKey,
  pause,
  request,
  smallest,
  urls,
  withResolvers,
} from "./cdc-common.js";

export { OfflineQueue, QueueFull } from "./cdc-offline.js";
export { Gap, Refused, fetchChanges } from "./cdc-common.js";

const TOKEN_EXPIRED = 4401;

const DEFAULTS = {
  minDelayMs: 500, // of reconnecting: a random time up to this, doubled with each failure ...
  maxDelayMs: 30_000, // ... up to this
  connectTimeoutMs: 10_000,
  stableMs: 5_000, // a connection that lived as long was a good one
  pingMs: 20_000,
  pongTimeoutMs: 10_000,
  pollAfter: 3, // failed connections in a row, before changes are polled
  retrySocketMs: 60_000, // how long to poll before the next try of a WebSocket
  pollWaitSeconds: 25,
  maxPendingFrames: 1_000, // that wait for slow listeners; beyond, the connection is given up, and resumed later
};

export class RealtimeClient {
  #options;
  #channels = new Map(); // name -> Channel
  #listeners = new Listeners(); // to "orders:created", and to "connect" and the like
  #running = null; // {stop, connected}, between connect and disconnect
  #connection = null; // what frames are taken from now: a Connection; frames of others are stale
  #work = Promise.resolve(); // one frame after the other, over all connections
  #pending = 0;
  #wake = () => {};
  #saved;

  constructor(options = {}) {
    this.#options = { ...DEFAULTS, ...options, ...urls(options) };
    this.#saved = new SavedCursors(this.#options);
  }

  /** `"websocket"`, `"polling"`, or `null` while there is no connection. */
  get transport() {
    return this.#connection?.ready ? this.#connection.transport : null;
  }

  isConnected() {
    return this.transport !== null;
  }

  /** How far each channel was listened to: what `subscribe` takes as `since`. */
  get cursors() {
    return Object.fromEntries([...this.#channels].map(([name, channel]) => [name, channel.cursor]));
  }

  /** Stay connected until `disconnect`. Resolves once connected; rejects where the token is refused. */
  connect() {
    if (this.#running) return this.#running.connected.promise;
    const running = (this.#running = { stop: new AbortController(), connected: withResolvers() });
    this.#watchPage(running.stop.signal);
    this.#run(running.stop.signal).catch((error) => {
      if (running !== this.#running) return;
      this.#end(error);
      this.#listeners.call("error", error);
    });
    return running.connected.promise;
  }

  disconnect() {
    if (this.#running) this.#end(new DOMException("disconnected", "AbortError"));
  }

  #end(reason) {
    const { stop, connected } = this.#running;
    this.#running = null;
    connected.reject(reason);
    stop.abort(reason);
    this.#drop(this.#connection, reason.message);
    this.#save();
  }

  /**
   * Listen to channels (`["*"]` alone: to all). Resolves with their cursors once they are subscribed: what is read
   * from now on by other means is not older than them.
   * since: cursors by channel, or one for all. Default: where the channel was left, as far as that was kept; else now.
   */
  subscribe(names, { since = {} } = {}) {
    const all = new Set([...this.#channels.keys(), ...names]);
    if (all.has("*") && all.size > 1) throw new TypeError("the channel * is all channels: subscribe to it alone");
    const fresh = [];
    for (const name of names) {
      const given = typeof since === "string" ? since : since[name];
      if (given !== undefined) this.unsubscribe([name]);
      if (this.#channels.has(name)) continue;
      this.#channels.set(name, new Channel(given ?? this.#saved.get(name)));
      fresh.push(name);
    }
    this.#connection?.subscribe(Object.fromEntries(fresh.map((name) => [name, this.#channels.get(name).cursor])));
    const ready = names.map((name) => this.#channels.get(name).ready.promise);
    const cursors = Promise.all(ready).then((found) => Object.fromEntries(names.map((name, i) => [name, found[i]])));
    cursors.catch(() => {}); // it is also told to onError
    return cursors;
  }

  /** Stop listening, and forget the channels' cursors. */
  unsubscribe(names) {
    const known = names.filter((name) => this.#channels.has(name));
    if (known.length === 0) return;
    for (const name of known) {
      this.#channels.get(name).ready.reject(new DOMException("unsubscribed", "AbortError"));
      this.#channels.delete(name);
      this.#saved.forget(name);
    }
    this.#connection?.unsubscribe(known);
  }

  /**
   * Listen: `"orders:created"`, `"orders:*"`, `"*:deleted"`, `"*"`. Returns a function that ends it. What a listener
   * returns is awaited before the next event; what it throws goes to `onError`, and its event counts as listened to.
   */
  on(pattern, listener) {
    return this.#listeners.add(patternKey(pattern), listener);
  }

  off(pattern, listener) {
    this.#listeners.remove(patternKey(pattern), listener);
  }

  /** `{transport}`, each time that a connection stands. */
  onConnect(listener) {
    return this.#listeners.add("connect", listener);
  }

  /** `{reason}`, each time that it is lost. */
  onDisconnect(listener) {
    return this.#listeners.add("disconnect", listener);
  }

  /**
   * `{channel, since, oldest, cursor}`: changes behind `since` are not kept any more. Load anew what you show; what a
   * listener returns is awaited, then the channel goes on with what is left.
   */
  onGap(listener) {
    return this.#listeners.add("gap", listener);
  }

  /** Errors of listeners, refusals by the server. Lost connections are no errors. */
  onError(listener) {
    return this.#listeners.add("error", listener);
  }

  /** Connect, and again, until stopped. Throws what trying again does not help against. */
  async #run(stop) {
    let failures = 0;
    while (!stop.aborted) {
      failures = (await this.#overSocket(stop)) ? 0 : failures + 1;
      await this.#work; // a slow listener first finishes what it has
      if (stop.aborted) return;
      if (failures >= this.#options.pollAfter && (await this.#overPolling(stop))) continue;
      const waiting = new AbortController();
      this.#wake = () => waiting.abort();
      await pause(backOffMs(failures, this.#options), AbortSignal.any([waiting.signal, stop]));
    }
  }

  /** One WebSocket connection, to its end. Returns whether it was a good one. */
  async #overSocket(stop) {
    try {
      const url = await this.#socketUrl(stop);
      if (stop.aborted) return false;
      const connection = new SocketConnection(url, this.#options, {
        onReady: () => this.#connected(connection),
        onFrame: (frame) => this.#take(frame, connection),
      });
      this.#connection = connection;
      this.#wake = () => connection.ping();
      const { reason, code } = await connection.ended(stop);
      this.#drop(connection, reason);
      if (code === TOKEN_EXPIRED) throw new Refused(401, "the token has expired", "connect with a new one");
      return connection.lifetimeMs >= this.#options.stableMs;
    } catch (error) {
      return this.#failedToConnect(error);
    }
  }

  async #socketUrl(stop) {
    const { wsUrl, httpUrl, token, connectTimeoutMs } = this.#options;
    const url = new URL(wsUrl);
    const headers = await bearer(token);
    if (headers.Authorization) {
      const signal = AbortSignal.any([stop, AbortSignal.timeout(connectTimeoutMs)]);
      const { ticket } = await request(`${httpUrl}/api/tickets`, { method: "POST", headers, signal });
      url.searchParams.set("ticket", ticket);
    }
    return url;
  }

  /** Poll for a while. Returns whether that went well to the end: then a WebSocket is worth a try. */
  async #overPolling(stop) {
    const until = performance.now() + this.#options.retrySocketMs;
    const connection = new PollConnection();
    this.#connection = connection;
    this.#wake = () => {};
    try {
      while (performance.now() < until && !stop.aborted) {
        await this.#pollOnce(connection, until, AbortSignal.any([stop, connection.begin()]));
        this.#connected(connection);
      }
      return true;
    } catch (error) {
      return this.#failedToConnect(error);
    } finally {
      this.#drop(connection, "polling ended");
    }
  }

  /** Ask once for all channels, from the cursor that is furthest behind: what others know already they ignore. */
  async #pollOnce(connection, until, signal) {
    const channels = [...this.#channels];
    const fresh = channels.filter(([, channel]) => channel.cursor === null);
    const seconds = Math.min(this.#options.pollWaitSeconds, (until - performance.now()) / 1000);
    try {
      if (fresh.length > 0) {
        const { cursor } = await this.#ask(fresh, { since: "now", limit: 1, signal });
        for (const [name] of fresh) this.#subscribed(name, cursor);
      } else if (channels.length > 0) {
        for (const [name, channel] of channels) this.#subscribed(name, channel.cursor);
        const since = smallest(channels.map(([, channel]) => channel.cursor));
        const wait = connection.ready ? Math.ceil(seconds) : 0; // the first only tells that it works
        const { changes, cursor } = await this.#ask(channels, { since, wait, signal });
        await this.#take({ type: "events", events: changes.map(asEvent) }, connection);
        const cursors = Object.fromEntries(channels.map(([name]) => [name, cursor]));
        await this.#take({ type: "cursors", cursors }, connection);
      } else if (!connection.ready) {
        await this.#ask([], { since: "now", limit: 1, signal }); // only tells that it works
      } else {
        await pause(Math.max(0, seconds) * 1000, signal);
      }
    } catch (error) {
      if (error instanceof Gap) await this.#take({ type: "polled gap", gap: error }, connection);
      else if (!connection.wasInterrupted) throw error;
    }
  }

  #ask(channels, parameters) {
    const { httpUrl, token } = this.#options;
    const names = channels.map(([name]) => name).filter((name) => name !== "*");
    return fetchChanges({ httpUrl, token, channels: names, limit: 500, ...parameters });
  }

  /** Whether trying again may help; if not, throws. A token that is a function may have a better one next time. */
  #failedToConnect(error) {
    if (!(error instanceof Refused)) return false;
    if (typeof this.#options.token !== "function") throw error;
    this.#listeners.call("error", error);
    return false;
  }

  #connected(connection) {
    if (connection.ready || connection !== this.#connection) return;
    connection.ready = true;
    this.#running.connected.resolve();
    connection.subscribe(this.cursors);
    this.#listeners.call("connect", { transport: connection.transport });
  }

  #drop(connection, reason) {
    if (!connection || connection !== this.#connection) return;
    this.#connection = null;
    for (const channel of this.#channels.values()) channel.active = false;
    connection.close();
    if (connection.ready) this.#listeners.call("disconnect", { reason });
  }

  /** Coming back (to the network, to the foreground) is a good moment to look whether the connection stands. */
  #watchPage(signal) {
    if (typeof document === "undefined") return;
    const seen = () => document.visibilityState === "visible" && this.#wake();
    globalThis.addEventListener("online", () => this.#wake(), { signal });
    document.addEventListener("visibilitychange", seen, { signal });
    globalThis.addEventListener("pagehide", () => this.#save(), { signal });
  }

  /** Handle a frame after those before it. Resolves when that is done. */
  #take(frame, connection) {
    this.#pending += 1;
    if (this.#pending > this.#options.maxPendingFrames) connection.close("the listeners are too slow");
    this.#work = this.#work
      .then(() => (connection === this.#connection ? this.#handle(frame, connection) : undefined))
      .catch((error) => this.#listeners.call("error", error))
      .finally(() => (this.#pending -= 1));
    return this.#work;
  }

  async #handle(frame, connection) {
    switch (frame.type) {
      case "events":
        for (const event of frame.events) {
          const running = this.#dispatch(event);
          if (running) await running;
        }
        break;
      case "cursors":
        for (const [name, cursor] of Object.entries(frame.cursors)) this.#advance(name, cursor);
        break;
      case "subscribed":
        for (const [name, cursor] of Object.entries(frame.cursors)) this.#subscribed(name, cursor);
        break;
      case "gap":
        await this.#gap(frame.channel, frame, connection);
        break;
      case "polled gap":
        for (const [name, { cursor }] of [...this.#channels]) {
          if (frame.gap.concerns(cursor)) await this.#gap(name, frame.gap, connection);
        }
        break;
      case "error":
        this.#refused(frame, connection);
        break;
    }
    this.#save();
  }

  /** Call the listeners of an event, unless it is known. Returns a promise where one of them goes on. */
  #dispatch(event) {
    const channel = this.#channels.get(event.channel) ?? this.#channels.get("*");
    if (!channel?.active || !isBeyond(event.cursor, channel.cursor)) return undefined;
    const { channel: name, event: what } = event;
    const patterns = [`${name}:${what}`, `${name}:*`, `*:${what}`, "*:*"];
    const running = patterns.flatMap((pattern) => this.#listeners.call(pattern, event));
    const listened = () => void (channel.cursor = event.cursor);
    return running.length > 0 ? Promise.all(running).then(listened) : listened();
  }

  #advance(name, cursor) {
    const channel = this.#channels.get(name);
    if (channel?.active && isBeyond(cursor, channel.cursor)) channel.cursor = cursor;
  }

  /** From here on, events are of this subscription, and not of one before it. */
  #subscribed(name, cursor) {
    const channel = this.#channels.get(name);
    if (!channel) return;
    channel.active = true;
    channel.cursor ??= cursor;
    channel.ready.resolve(channel.cursor);
  }

  async #gap(name, { oldest, cursor }, connection) {
    const channel = this.#channels.get(name);
    if (!channel) return;
    await Promise.all(this.#listeners.call("gap", { channel: name, since: channel.cursor, oldest, cursor }));
    channel.cursor = cursor;
    const goesOn = connection === this.#connection && channel === this.#channels.get(name);
    if (goesOn) connection.subscribe({ [name]: cursor });
  }

  /** A channel that is not allowed is given up; what concerns the connection as a whole may be better next time. */
  #refused({ error, hint, channel: name }, connection) {
    const refusal = Object.assign(new Error(error), { hint, channel: name });
    this.#channels.get(name)?.ready.reject(refusal);
    this.#channels.delete(name);
    this.#listeners.call("error", refusal);
    if (!name) connection.close(error);
  }

  #save() {
    try {
      this.#saved.save(this.cursors);
    } catch (error) {
      this.#listeners.call("error", error);
    }
  }
}

class Channel {
  active = false; // whether events that come are of this subscription
  ready = withResolvers(); // of the cursor, once subscribed

  constructor(cursor) {
    this.cursor = cursor;
  }
}
