/** The picture of the flow: a lane for each source, from the source through its queue to its sinks. */

import { bytes, count, drawing, duration, element, plural, rate, setText } from "./page-dom.js";
import { total } from "./page-rates.js";

const TONES = {
  running: "good",
  starting: "busy",
  copying: "busy",
  "catching up": "busy",
  held: "calm",
  paused: "calm",
  waiting: "bad",
  failed: "bad",
  stopped: "bad",
};

const SPARK = { width: 120, height: 28, seconds: 60 };

export class Flow {
  #root;
  #onToggle;
  #lanes = new Map();
  #shape = "";

  /** onToggle: called with a pipeline's name and whether it is to be paused. */
  constructor(root, onToggle) {
    this.#root = root;
    this.#onToggle = onToggle;
  }

  update(status, history) {
    const sinks = Object.entries(status.sinks).map(([name, sink]) => [name, sink.source]);
    const shape = JSON.stringify([Object.keys(status.sources), sinks]);
    if (shape !== this.#shape) this.#build(status);
    this.#shape = shape;
    for (const [name, lane] of this.#lanes) lane.update(status.sources[name], status.sinks, history);
  }

  #build(status) {
    for (const lane of this.#lanes.values()) lane.close();
    this.#lanes.clear();
    for (const name of Object.keys(status.sources)) {
      const sinks = Object.keys(status.sinks).filter((sink) => status.sinks[sink].source === name);
      this.#lanes.set(name, new Lane(name, sinks, this.#onToggle));
    }
    this.#root.replaceChildren(...[...this.#lanes.values()].map((lane) => lane.root));
  }
}

class Lane {
  #name;
  #source;
  #queue = new QueueCard();
  #sinks;
  #pipes = drawing("svg", { class: "pipes", "aria-hidden": "true" });
  #observer = new ResizeObserver(() => this.#draw());

  constructor(name, sinks, onToggle) {
    this.#name = name;
    this.#source = new PipelineCard(name, "Source", onToggle);
    this.#sinks = new Map(sinks.map((sink) => [sink, new PipelineCard(sink, "Sink", onToggle)]));
    const cards = [...this.#sinks.values()].map((card) => card.root);
    this.root = element(
      "div",
      { class: "lane" },
      this.#pipes,
      element("div", { class: "stage" }, this.#source.root),
      element("div", { class: "stage narrow" }, this.#queue.root),
      element("div", { class: "stage" }, ...cards),
    );
    for (const node of [this.root, this.#source.root, this.#queue.root, ...cards]) this.#observer.observe(node);
  }

  close() {
    this.#observer.disconnect();
  }

  update(source, sinks, history) {
    this.#source.update(source, history.series(this.#name), sourceFacts(source));
    this.#queue.update(source.queue);
    this.#pace(this.#queue.root, history.rate(this.#name));
    for (const [name, card] of this.#sinks) {
      card.update(sinks[name], history.series(name), sinkFacts(sinks[name]));
      this.#pace(card.root, history.rate(name));
    }
  }

  /** What flows moves: the faster, the more there is. */
  #pace(target, perSecond) {
    const pipe = this.#pipes.querySelector(`[data-to="${target.dataset.pipe}"]`);
    if (!pipe) return;
    pipe.classList.toggle("moving", perSecond > 0);
    pipe.style.animationDuration = `${Math.max(0.35, 2.4 - 0.45 * Math.log10(1 + (perSecond ?? 0)))}s`;
  }

  #draw() {
    const frame = this.root.getBoundingClientRect();
    const box = (node) => {
      const { left, top, right, bottom } = node.getBoundingClientRect();
      const [x, y] = [frame.left, frame.top];
      return { left: left - x, top: top - y, right: right - x, bottom: bottom - y };
    };
    const nodes = [this.#source.root, this.#queue.root, ...[...this.#sinks.values()].map((card) => card.root)];
    nodes.forEach((node, number) => (node.dataset.pipe = number));
    const queue = box(this.#queue.root);
    const lines = [[box(this.#source.root), queue, 1], ...nodes.slice(2).map((node, i) => [queue, box(node), i + 2])];
    this.#pipes.replaceChildren(
      ...lines.flatMap(([from, to, number]) => {
        const d = curve(from, to);
        return [drawing("path", { class: "pipe", d }), drawing("path", { class: "stream", d, "data-to": number })];
      }),
    );
  }
}

/** From the middle of one card's side to the other's; downwards where the cards stand below each other. */
function curve(from, to) {
  if (to.left >= from.right) {
    const [x1, y1, x2, y2] = [from.right, (from.top + from.bottom) / 2, to.left, (to.top + to.bottom) / 2];
    const middle = (x1 + x2) / 2;
    return `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`;
  }
  return `M${(from.left + from.right) / 2} ${from.bottom}L${(to.left + to.right) / 2} ${to.top}`;
}

/** A source or a sink. */
class PipelineCard {
  #state = element("span", { class: "chip" });
  #rate = element("strong");
  #spark = drawing("polyline");
  #facts = new Facts();
  #copy = new CopyProgress();
  #button;
  #paused = false;

  constructor(name, kind, onToggle) {
    this.#button = element("button", { type: "button", onclick: () => this.#toggle(name, onToggle) });
    const viewBox = `0 0 ${SPARK.width} ${SPARK.height}`;
    const spark = { viewBox, preserveAspectRatio: "none", "aria-hidden": "true" };
    this.root = element(
      "article",
      { class: "card pipeline", "aria-label": `${kind} ${name}` },
      element(
        "header",
        {},
        element("span", { class: "kind" }, kind),
        element("h3", { title: name }, name),
        this.#state,
      ),
      element(
        "div",
        { class: "pulse" },
        element("p", { class: "rate" }, this.#rate, " changes/s"),
        drawing("svg", spark, this.#spark),
      ),
      this.#copy.root,
      element("footer", {}, this.#facts.root, this.#button),
    );
  }

  async #toggle(name, onToggle) {
    this.#button.disabled = true;
    await onToggle(name, !this.#paused);
    this.#button.disabled = false;
  }

  update(pipeline, series, facts) {
    this.#paused = pipeline.state === "paused";
    this.root.dataset.tone = TONES[pipeline.state] ?? "busy";
    setText(this.#state, pipeline.state);
    setText(this.#rate, rate(series?.rates.at(-1)));
    setText(this.#button, this.#paused ? "Resume" : "Pause");
    this.#button.classList.toggle("primary", this.#paused);
    this.#spark.setAttribute("points", sparkline(series?.rates ?? []));
    this.#facts.update(facts);
    this.#copy.update(pipeline.copy);
  }
}

function sparkline(rates) {
  const shown = rates.slice(-SPARK.seconds);
  const most = Math.max(1, ...shown);
  const left = SPARK.seconds - shown.length;
  const x = (index) => ((left + index) / (SPARK.seconds - 1)) * SPARK.width;
  const y = (value) => SPARK.height - 2 - (value / most) * (SPARK.height - 4);
  return shown.map((value, index) => `${x(index).toFixed(1)},${y(value ?? 0).toFixed(1)}`).join(" ");
}

function sourceFacts(source) {
  return {
    Lag: duration(source.lag_seconds),
    Captured: count(total(source)),
    "Kept by the slot": source.slot ? bytes(source.slot.retained_bytes) : null,
    "Log kept for": source.oplog ? duration(source.oplog.window_seconds) : null,
    Retries: source.retries > 0 ? count(source.retries) : null,
  };
}

function sinkFacts(sink) {
  return {
    Lag: duration(sink.lag_seconds),
    Applied: count(total(sink)),
    Parked: sink.parked > 0 ? `${count(sink.parked)}, for ${duration(sink.parked_oldest_seconds)}` : null,
    Dead: sink.dead > 0 ? count(sink.dead) : null,
    "Rows put back": sink.healed_rows > 0 ? count(sink.healed_rows) : null,
    Retries: sink.retries > 0 ? count(sink.retries) : null,
  };
}

class QueueCard {
  #size = element("strong");
  #level = element("i");
  #gauge = element("div", { class: "gauge", role: "meter", "aria-label": "Fill", "aria-valuemin": 0 }, this.#level);
  #facts = new Facts();

  constructor() {
    this.root = element(
      "article",
      { class: "card queue", "aria-label": "Queue" },
      element("header", {}, element("h3", {}, "Queue")),
      element("p", { class: "rate" }, this.#size),
      this.#gauge,
      this.#facts.root,
    );
  }

  update(queue) {
    this.root.dataset.tone = !queue || queue.full ? "bad" : "good";
    setText(this.#size, queue ? bytes(queue.bytes) : "not open");
    if (!queue) return this.#facts.update({});
    const share = Math.min(1, queue.bytes / queue.max_bytes);
    this.#level.style.width = `${(share * 100).toFixed(1)}%`;
    this.#gauge.setAttribute("aria-valuenow", queue.bytes);
    this.#gauge.setAttribute("aria-valuemax", queue.max_bytes);
    return this.#facts.update({
      "Room for": bytes(queue.max_bytes),
      Batches: count(queue.batches),
      Oldest: queue.oldest_seconds === null ? "–" : duration(queue.oldest_seconds),
      "Disk free": bytes(queue.free_disk_bytes),
    });
  }
}

class CopyProgress {
  #bar = element("progress", { max: 1, "aria-label": "Initial copy" });
  #text = element("p");
  root = element("div", { class: "copy", hidden: true }, this.#bar, this.#text);

  update(copy) {
    this.root.hidden = !copy || copy.tables_done >= copy.tables_expected;
    if (this.root.hidden) return;
    const byRows = copy.rows_done / (copy.rows_expected || 1);
    this.#bar.value = Math.min(1, copy.bytes_expected > 0 ? copy.bytes_done / copy.bytes_expected : byRows);
    const left = copy.seconds_left === null ? "" : `, ${duration(copy.seconds_left)} left`;
    const tables = `${copy.tables_done} of ${plural(copy.tables_expected, "table", "tables")}`;
    setText(this.#text, `Copied ${tables}, ${plural(copy.rows_done, "row", "rows")}${left}`);
  }
}

/** Names and values; what is `null` is not there. */
class Facts {
  root = element("dl");
  #values = new Map();

  update(facts) {
    const shown = Object.entries(facts).filter(([, value]) => value !== null);
    if (shown.map(([name]) => name).join() !== [...this.#values.keys()].join()) {
      this.#values = new Map(shown.map(([name]) => [name, element("dd")]));
      const row = ([name, value]) => element("div", { "data-fact": name }, element("dt", {}, name), value);
      this.root.replaceChildren(...[...this.#values].map(row));
    }
    for (const [name, value] of shown) setText(this.#values.get(name), value);
  }
}
