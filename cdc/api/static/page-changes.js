/** The latest changes, as they come. */

import { byId, clock, count, element, rate, setText } from "./page-dom.js";

const KEPT = 500;
const SHOWN = 60;
const MAX_FILTERS = 24;
const DRAW_MS = 200; // a thousand changes a second are more than anybody reads
const PACE_SECONDS = 5;

const NAMES = { CREATE: "created", UPDATE: "updated", DELETE: "deleted" };

export class Changes {
  #onOpen;
  #kept = []; // the newest last
  #fresh = []; // since the last drawing
  #counts = new Map(); // entity type -> how many were seen
  #types = new Set(); // to be shown; empty: all
  #find = "";
  #frozen = false;
  #arrivals = []; // [time, how many]

  /** onOpen: called with an event whose details are asked for. */
  constructor(onOpen) {
    this.#onOpen = onOpen;
    byId("find").addEventListener("input", ({ target }) => {
      this.#find = target.value.trim();
      this.#drawAll();
    });
    byId("freeze").addEventListener("click", ({ target }) => this.#freeze(target));
    setInterval(() => this.#draw(), DRAW_MS);
    this.#drawFilters();
  }

  add(event) {
    this.#kept.push(event);
    if (this.#kept.length > KEPT) this.#kept.splice(0, this.#kept.length - KEPT);
    this.#fresh.push(event);
    if (this.#fresh.length > SHOWN * 4) this.#fresh.splice(0, SHOWN);
    this.#counts.set(event.entityType, (this.#counts.get(event.entityType) ?? 0) + 1);
    const second = Math.floor(performance.now() / 1000);
    if (this.#arrivals.at(-1)?.[0] === second) this.#arrivals.at(-1)[1] += 1;
    else this.#arrivals.push([second, 1]);
  }

  #freeze(button) {
    this.#frozen = !this.#frozen;
    button.setAttribute("aria-pressed", this.#frozen);
    setText(button, this.#frozen ? "Go on" : "Freeze");
    if (!this.#frozen) this.#drawAll();
  }

  #wanted(event) {
    const type = this.#types.size === 0 || this.#types.has(event.entityType);
    return type && (this.#find === "" || event.id.includes(this.#find));
  }

  /** Add what is new on top. Rows that stay are left alone: somebody may be on one of them with the keyboard. */
  #draw() {
    this.#drawPace();
    if (this.#frozen || document.hidden || this.#fresh.length === 0) return;
    const rows = this.#fresh.filter((event) => this.#wanted(event)).slice(-SHOWN);
    this.#fresh = [];
    const body = byId("rows");
    body.prepend(...rows.reverse().map((event) => this.#row(event, "fresh")));
    while (body.rows.length > SHOWN) body.lastElementChild.remove();
    this.#drawEmpty();
    this.#drawFilters();
  }

  #drawAll() {
    this.#fresh = [];
    const rows = this.#kept.filter((event) => this.#wanted(event)).slice(-SHOWN);
    byId("rows").replaceChildren(...rows.reverse().map((event) => this.#row(event)));
    this.#drawEmpty();
    this.#drawFilters();
  }

  #drawEmpty() {
    byId("empty").hidden = byId("rows").rows.length > 0;
    const nothing = this.#kept.length > 0 ? "None of the latest changes fits." : "Waiting for the first change …";
    setText(byId("empty"), nothing);
  }

  #drawPace() {
    const now = performance.now() / 1000;
    while (this.#arrivals[0]?.[0] < now - PACE_SECONDS - 1) this.#arrivals.shift();
    const seen = this.#arrivals.reduce((sum, [, number]) => sum + number, 0);
    setText(byId("pace"), this.#kept.length > 0 ? `${rate(seen / PACE_SECONDS)} a second` : "");
  }

  #drawFilters() {
    const types = [...this.#counts.keys()].sort().slice(0, MAX_FILTERS);
    const root = byId("filters");
    root.hidden = types.length < 2 && this.#types.size === 0;
    const wanted = ["", ...types];
    if ([...root.children].map((button) => button.dataset.type).join("\n") !== wanted.join("\n")) {
      root.replaceChildren(...wanted.map((type) => this.#filter(type)));
    }
    for (const button of root.children) {
      const { type } = button.dataset;
      button.setAttribute("aria-pressed", type === "" ? this.#types.size === 0 : this.#types.has(type));
      setText(button.lastElementChild, type === "" ? "" : count(this.#counts.get(type)));
    }
  }

  #filter(type) {
    const toggle = () => {
      if (type === "") this.#types.clear();
      else if (!this.#types.delete(type)) this.#types.add(type);
      this.#drawAll();
    };
    const attributes = { type: "button", class: "chip", "data-type": type, onclick: toggle };
    return element("button", attributes, element("span", {}, type || "All"), element("small"));
  }

  #row(event, look = "") {
    const open = () => this.#onOpen(event);
    const changed = event.changed?.join(", ") ?? "";
    const where = [event.locationId, event.userId].filter(Boolean).join(", ");
    const id = element("button", { type: "button", class: "id", title: event.id }, event.id);
    return element(
      "tr",
      { class: look, onclick: open },
      element("td", { class: "time" }, element("time", { datetime: event.changedAt }, clock(event.changedAt))),
      element("td", {}, badge(event)),
      element("td", { class: "entity", title: event.entityType }, event.entityType),
      element("td", {}, id),
      element("td", { class: "wide faint", title: changed }, changed),
      element("td", { class: "wide faint", title: where }, where),
    );
  }
}

/** What happened, in a colour of its own. */
export function badge({ changeType, event }) {
  const name = NAMES[changeType] ?? event ?? "event";
  return element("span", { class: `badge ${NAMES[changeType] ?? "event"}` }, name);
}

