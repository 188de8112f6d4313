/** What is wrong, and what a person can do about it, in plain words. */

import { count, duration, element, plural } from "./page-dom.js";

/** `[{tone, text, hint}]`, the worst first, from one /status. */
export function notes(status) {
  const pipelines = [...Object.entries(status.sources), ...Object.entries(status.sinks)];
  const bad = status.problems.map((text) => ({ tone: "bad", text, hint: hintFor(text, pipelines) }));
  const queues = Object.entries(status.sources).filter(([, source]) => source.queue?.full);
  const full = queues.map(([name]) => ({
    tone: "bad",
    text: `${name}: the queue is full, so the source waits`,
    hint: "A sink is behind or stopped. Until it has caught up, the source keeps its log; then this ends by itself.",
  }));
  const paused = pipelines.filter(([, { state }]) => state === "paused");
  const calm = paused.map(([name]) => ({
    tone: "calm",
    text: `${name} is paused`,
    hint: "Somebody wanted it so, and it stays so over restarts. Resume it here, or with cdc resume.",
  }));
  return [...bad, ...full, ...parked(status), ...calm];
}

function parked(status) {
  const waiting = Object.entries(status.sinks).filter(([, sink]) => sink.parked > sink.dead);
  return waiting.map(([name, sink]) => {
    const what = plural(sink.parked - sink.dead, "change waits", "changes wait");
    return {
      tone: "warn",
      text: `${name}: ${what}, for ${duration(sink.parked_oldest_seconds)}`,
      hint: "The target refused them. They are tried again; later changes of the same rows wait, too, others go on.",
    };
  });
}

function hintFor(text, pipelines) {
  const [, pipeline] = pipelines.find(([name]) => text.startsWith(`${name}:`)) ?? [];
  if (pipeline?.dead > 0 && text.includes("dead")) {
    return `${count(pipeline.dead)} were tried so often that cdc gave up. Retry or discard them below, or with cdc dead-letters.`;
  }
  return pipeline?.hint ?? "";
}

export function drawNotes(root, found) {
  const text = JSON.stringify(found);
  if (root.dataset.shown === text) return; // it is read aloud when it changes
  root.dataset.shown = text;
  root.hidden = found.length === 0;
  const lines = found.map(({ tone, text: what, hint }) => {
    const advice = hint ? element("p", {}, hint) : null;
    return element("div", { class: "note", "data-tone": tone }, element("strong", {}, what), advice);
  });
  root.replaceChildren(...lines);
}
