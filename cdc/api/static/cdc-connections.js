/** The two ways in which the client hears of changes. Both know nothing of listeners and cursors. */

import { withResolvers } from "./cdc-common.js";

const EVENTS = { CREATE: "created", UPDATE: "updated", DELETE: "deleted" };

/** One WebSocket: connects, passes frames on, finds out when it is dead. */
export class SocketConnection {
  transport = "websocket";
  ready = false;
  #socket;
  #options;
  #handlers;
  #unanswered = new Map(); // channel -> how many of our subscriptions the server has still to answer
  #ended = withResolvers();
  #timer;
  #readyAt = Infinity;
  #endedAt = 0;

  /** handlers: `onReady()` once the server has greeted, `onFrame(frame)` for each of the others. */
  constructor(url, options, handlers) {
    this.#options = options;
    this.#handlers = handlers;
    this.#socket = new WebSocket(url);
    this.#socket.onmessage = ({ data }) => this.#receive(JSON.parse(data));
    this.#socket.onclose = ({ code, reason }) => this.#end(reason || `closed (${code})`, code);
    this.#expectFrame(options.connectTimeoutMs);
  }

  /** From the greeting to the end, in milliseconds. */
  get lifetimeMs() {
    return this.#endedAt - this.#readyAt;
  }

  /** Resolves with `{reason, code}` when the connection is over. */
  ended(stop) {
    stop.addEventListener("abort", () => this.close(), { once: true });
    return this.#ended.promise;
  }

  close(reason = "disconnected") {
    this.#end(reason, 1000);
  }

  /** cursors: by channel; `null` for one that begins now. */
  subscribe(cursors) {
    const names = Object.keys(cursors);
    if (!this.ready || names.length === 0) return;
    for (const name of names) this.#unanswered.set(name, (this.#unanswered.get(name) ?? 0) + 1);
    const since = Object.fromEntries(Object.entries(cursors).filter(([, cursor]) => cursor !== null));
    this.#send({ type: "subscribe", channels: names, since });
  }

  unsubscribe(names) {
    if (this.ready) this.#send({ type: "unsubscribe", channels: names });
  }

  /** Something has to come back soon, or the connection is dead. */
  ping() {
    if (!this.ready) return;
    this.#send({ type: "ping" });
    this.#expectFrame(this.#options.pongTimeoutMs);
  }

  #receive(frame) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.ping(), this.#options.pingMs);
    if (frame.type === "welcome") {
      this.#readyAt = performance.now();
      this.#handlers.onReady();
    } else if (frame.type === "subscribed") {
      const cursors = Object.entries(frame.cursors).filter(([name]) => this.#isLastAnswer(name));
      this.#handlers.onFrame({ ...frame, cursors: Object.fromEntries(cursors) });
    } else if (frame.type === "gap" || (frame.type === "error" && frame.channel)) {
      if (this.#isLastAnswer(frame.channel)) this.#handlers.onFrame(frame);
    } else if (frame.type !== "pong") {
      this.#handlers.onFrame(frame);
    }
  }

  /** Whoever unsubscribes and subscribes again gets two answers; events belong to the second. */
  #isLastAnswer(name) {
    const left = Math.max(0, (this.#unanswered.get(name) ?? 0) - 1);
    this.#unanswered.set(name, left);
    return left === 0;
  }

  #expectFrame(milliseconds) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#end("no answer", 1006), milliseconds);
  }

  #send(frame) {
    if (this.#socket.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(frame));
  }

  /** Does not wait for the socket: a dead one takes its time to close. */
  #end(reason, code) {
    if (this.#endedAt) return;
    this.#endedAt = performance.now();
    clearTimeout(this.#timer);
    this.#socket.onmessage = this.#socket.onclose = null;
    this.#socket.close();
    this.#ended.resolve({ reason, code });
  }
}

/** Polling in the shape of a connection. Whoever changes the subscriptions interrupts the request that waits. */
export class PollConnection {
  transport = "polling";
  ready = false;
  #request = new AbortController();

  /** A signal for the next request. */
  begin() {
    this.#request = new AbortController();
    return this.#request.signal;
  }

  get wasInterrupted() {
    return this.#request.signal.aborted;
  }

  subscribe() {
    this.#request.abort();
  }

  unsubscribe() {
    this.#request.abort();
  }

  close() {
    this.#request.abort();
  }
}

/** A polled change in the form of a WebSocket event. */
export function asEvent({ id, entityId, changeType, event, before, after, ...change }) {
  const { channel, entityType, version, changedAt, locationId, userId, changed } = change;
  return {
    channel,
    event: event ?? EVENTS[changeType],
    id: entityId,
    data: changeType === "DELETE" ? before : after,
    cursor: String(id),
    ...{ entityType, changeType, version, changedAt, locationId, userId, changed },
  };
}
