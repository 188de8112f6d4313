/** Throughput and lag over the last minutes, drawn by uPlot. */

import { duration, element, rate, setText } from "./page-dom.js";
import { REMEMBERED_SECONDS } from "./page-rates.js";

const SHORTEST_SECONDS = 120;
const COLOURS = 6;
const HEIGHT = 190;

export class Charts {
  #rates;
  #lags;

  constructor(nodes) {
    const perSecond = (value) => (value >= 1000 ? `${value / 1000}k` : `${value}`);
    this.#rates = new Chart(nodes.rates, nodes.rateLegend, (series) => series.rates, rate, perSecond);
    this.#lags = new Chart(nodes.lags, nodes.lagLegend, (series) => series.lags, duration, (value) => `${value} s`);
  }

  update(history) {
    this.#rates.update(history);
    this.#lags.update(history);
  }
}

class Chart {
  #node;
  #legend;
  #pick;
  #say;
  #tick;
  #plot = null;
  #names = "";
  #values = new Map();

  /** pick: of a pipeline's series. say: a value, for the legend. tick: a value, for the axis. */
  constructor(node, legend, pick, say, tick) {
    [this.#node, this.#legend, this.#pick, this.#say, this.#tick] = [node, legend, pick, say, tick];
    new ResizeObserver(() => this.#plot?.setSize({ width: node.clientWidth, height: HEIGHT })).observe(node);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (this.#names = ""));
  }

  update(history) {
    const names = history.names;
    if (names.join() !== this.#names) this.#build(names);
    this.#names = names.join();
    this.#plot.setData([history.times, ...names.map((name) => this.#pick(history.series(name)))], false);
    const now = history.times.at(-1);
    this.#plot.batch(() => {
      this.#plot.setScale("x", { min: now - span(history.times), max: now });
      this.#plot.setScale("y", { min: 0, max: highest(this.#plot.data) });
    });
    for (const name of names) setText(this.#values.get(name), this.#say(this.#pick(history.series(name)).at(-1)));
  }

  #build(names) {
    this.#plot?.destroy();
    const style = getComputedStyle(document.documentElement);
    const axis = {
      stroke: style.getPropertyValue("--faint"),
      grid: { stroke: style.getPropertyValue("--grid"), width: 1 },
      ticks: { show: false },
      font: `11px ${style.getPropertyValue("--sans")}`,
    };
    const series = names.map((name, index) => {
      const stroke = style.getPropertyValue(`--series-${(index % COLOURS) + 1}`).trim();
      return { label: name, stroke, width: 2, fill: `${stroke}1c`, points: { show: false }, spanGaps: false };
    });
    const timeAxis = {
      splits: ({ scales }) => steps(scales.x.min, scales.x.max),
      values: (plot, splits) => splits.map((at) => ago(plot.scales.x.max - at)),
    };
    const options = {
      width: this.#node.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false, drag: { x: false, y: false } },
      scales: { x: { auto: false }, y: { auto: false } },
      axes: [
        { ...axis, ...timeAxis, size: 30 },
        { ...axis, size: 52, values: (_, splits) => splits.map(this.#tick) },
      ],
      series: [{}, ...series],
    };
    this.#plot = new globalThis.uPlot(options, [[], ...names.map(() => [])], this.#node);
    this.#values = new Map(names.map((name) => [name, element("b")]));
    const rows = [...this.#values].map(([name, value], index) => {
      return element("li", { class: `series-${(index % COLOURS) + 1}` }, element("span", {}, name), value);
    });
    this.#legend.replaceChildren(...rows);
  }
}

/** As long as the page has been open, within bounds. */
const span = (times) => Math.min(REMEMBERED_SECONDS, Math.max(SHORTEST_SECONDS, times.at(-1) - times[0]));

/** Four or five round numbers of seconds back from now. */
function steps(from, now) {
  const step = [30, 60, 120].find((seconds) => seconds * 5 >= now - from) ?? 180;
  return Array.from({ length: Math.floor((now - from) / step + 1e-6) + 1 }, (_, i) => now - i * step).reverse();
}

function ago(seconds) {
  if (seconds < 1) return "now";
  return seconds < 60 ? `−${Math.round(seconds)} s` : `−${Math.round(seconds / 6) / 10} min`;
}

/** A bit more than the largest value, and never so little that noise looks like a mountain. */
function highest([, ...series]) {
  const most = series.reduce((found, values) => values.reduce((high, value) => Math.max(high, value ?? 0), found), 0);
  return Math.max(1, most * 1.15);
}
