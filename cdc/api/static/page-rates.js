/** From counters, as /status has them, to rates; and what the charts and sparklines remember of them. */

export const REMEMBERED_SECONDS = 600;
const SMOOTH_SECONDS = 3;

/** All changes that a pipeline has counted. */
export const total = ({ changes }) => Object.values(changes).reduce((sum, number) => sum + number, 0);

/** The rate of one counter, over the last few seconds. */
class Meter {
  #samples = [];

  /** Returns changes per second; `null` as long as nothing can be said. */
  add(seconds, count) {
    const last = this.#samples.at(-1);
    if (last && count < last.count) this.#samples = []; // the daemon was restarted
    this.#samples.push({ seconds, count });
    while (this.#samples.length > 2 && this.#samples[1].seconds <= seconds - SMOOTH_SECONDS) this.#samples.shift();
    const first = this.#samples[0];
    return seconds > first.seconds ? (count - first.count) / (seconds - first.seconds) : null;
  }
}

/** What the page remembers: for each moment, of each pipeline, its rate and its lag. */
export class History {
  times = [];
  #meters = new Map();
  #series = new Map(); // name -> {rates, lags}, as long as `times`

  get names() {
    return [...this.#series.keys()];
  }

  series(name) {
    return this.#series.get(name);
  }

  /** The last rate of a pipeline. */
  rate(name) {
    return this.#series.get(name)?.rates.at(-1) ?? null;
  }

  /** pipelines: `[name, source or sink status]`. */
  add(seconds, pipelines) {
    this.times.push(seconds);
    for (const [name, pipeline] of pipelines) {
      if (!this.#series.has(name)) this.#begin(name);
      const { rates, lags } = this.#series.get(name);
      rates.push(this.#meters.get(name).add(seconds, total(pipeline)));
      lags.push(pipeline.lag_seconds);
    }
    const gone = this.names.filter((name) => !pipelines.some(([other]) => other === name));
    for (const name of gone) this.#series.delete(name);
    while (this.times[0] < seconds - REMEMBERED_SECONDS) this.#forget();
  }

  #begin(name) {
    const nothing = () => Array(this.times.length - 1).fill(null);
    this.#series.set(name, { rates: nothing(), lags: nothing() });
    this.#meters.set(name, new Meter());
  }

  #forget() {
    this.times.shift();
    for (const { rates, lags } of this.#series.values()) {
      rates.shift();
      lags.shift();
    }
  }
}
