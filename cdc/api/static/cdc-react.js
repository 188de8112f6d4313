/** React hooks over the changes of cdc: they poll, and need nothing but `react` (18 or newer) beside cdc-client.js. */

import { useCallback, useEffect, useMemo, useRef, useState } from "react";

import { fetchChanges } from "./cdc-client.js";
import { backOffMs, pause, urls } from "./cdc-common.js";

const HIDDEN_FACTOR = 6;
const MAX_DELAY_MS = 60_000;

/**
 * Poll for changes as long as the component is there.
 *
 * entityTypes: default: all. pollInterval: milliseconds; six times as long while the page is hidden. onChanges: gets
 * a list, never an empty one; what it returns is awaited, and only then the cursor moves on: what it throws becomes
 * `error`, and the same changes come again. onGap: changes were missed, load anew what you show. since: where to
 * begin, default `now`.
 * Returns {isConnected, isPolling, lastSync, error, cursor, syncNow}.
 */
export function useRealTimeSync({ pollInterval = 5_000, enabled = true, ...options } = {}) {
  const [state, setState] = useState(NOTHING_YET);
  const latest = useRef(options); // its functions may be new with every rendering
  useEffect(() => {
    latest.current = options;
  });
  const cursor = useRef(null);
  const wake = useRef(() => {});
  const running = useRef(Promise.resolve());
  const { httpUrl, locationId, since = "now" } = options;
  const entityTypes = options.entityTypes?.join(",") ?? "";

  useEffect(() => {
    if (!enabled) return undefined;
    const stop = new AbortController();
    const begin = JSON.stringify([httpUrl, entityTypes, locationId, since]);
    if (cursor.current?.of !== begin) cursor.current = { of: begin, value: null };
    const poller = { latest, cursor: cursor.current, wake, pollInterval, setState, signal: stop.signal };
    const request = { httpUrl: urls({ httpUrl }).httpUrl, entityTypes, locationId, since };
    running.current = running.current.then(() => poll(poller, request)); // an earlier one first ends what it is at
    return () => stop.abort();
  }, [enabled, httpUrl, entityTypes, locationId, since, pollInterval]);

  const syncNow = useCallback(() => wake.current(), []);
  return useMemo(() => ({ ...state, syncNow }), [state, syncNow]);
}

/**
 * The latest changes of an entity, or of all of a type, since the component is there: {changes, latest, ...} beside
 * what `useRealTimeSync` returns. changes: the newest first, at most `limit` (100).
 */
export function useEntityChanges(entityType, entityId, { limit = 100, onChanges, ...options } = {}) {
  const [changes, setChanges] = useState([]);
  const wanted = entityId === undefined || entityId === null ? null : String(entityId);
  useEffect(() => setChanges([]), [entityType, wanted]);
  const take = async (found) => {
    const mine = found.filter((change) => wanted === null || change.entityId === wanted || change.entityId === "*");
    if (mine.length === 0) return;
    await onChanges?.(mine); // if that fails, they come again
    setChanges((known) => [...mine.toReversed(), ...known].slice(0, limit));
  };
  const state = useRealTimeSync({ ...options, entityTypes: [entityType], onChanges: take });
  return { ...state, changes, latest: changes[0] ?? null };
}

const NOTHING_YET = { isConnected: false, isPolling: false, lastSync: null, error: null, cursor: null };

/** Poll until the signal is aborted. */
async function poll({ latest, cursor, wake, pollInterval, setState, signal }, request) {
  const say = (news) => signal.aborted || setState((state) => ({ ...state, ...news }));
  let failures = 0;
  while (!signal.aborted) {
    say({ isPolling: true });
    try {
      const more = await look(latest, cursor, request, signal);
      failures = 0;
      say({ isPolling: false, isConnected: true, lastSync: new Date(), error: null, cursor: cursor.value });
      if (more) continue;
    } catch (error) {
      failures += 1;
      say({ isPolling: false, isConnected: false, error });
    }
    await rest(wake, signal, pollInterval, failures);
  }
}

/** One request. Returns whether there is more to be had at once. */
async function look(latest, cursor, { since, ...request }, signal) {
  const { token } = latest.current; // of the rest, whatever is wanted when the answer has come
  try {
    const found = await fetchChanges({ ...request, token, since: cursor.value ?? since, limit: 500, signal });
    if (signal.aborted) return false; // the cursor stays, so whoever comes next gets them
    if (found.changes.length > 0) await latest.current.onChanges?.(found.changes);
    cursor.value = found.cursor;
    return found.hasMore;
  } catch (error) {
    if (error.name !== "Gap") throw error;
    await latest.current.onGap?.(error);
    cursor.value = error.cursor;
    return true;
  }
}

/** Until the next look: until somebody asks for it, the page is seen again or on line, or the time is over. */
async function rest(wake, signal, pollInterval, failures) {
  const early = new AbortController();
  wake.current = () => early.abort();
  const seen = () => document.visibilityState === "visible" && early.abort();
  globalThis.addEventListener("online", wake.current, { signal: early.signal });
  document.addEventListener("visibilitychange", seen, { signal: early.signal });
  const usual = document.visibilityState === "hidden" ? pollInterval * HIDDEN_FACTOR : pollInterval;
  const extra = failures > 0 ? backOffMs(failures, { minDelayMs: pollInterval, maxDelayMs: MAX_DELAY_MS }) : 0;
  await pause(usual + extra, AbortSignal.any([early.signal, signal]));
  early.abort(); // takes the listeners away, too
}
