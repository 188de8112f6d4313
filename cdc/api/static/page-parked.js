/** What targets refuse: parked changes, and what an operator can do with them. */

import { byId, clock, duration, element, plural, setText } from "./page-dom.js";
import { ask } from "./page-server.js";

const SHOWN = 100;
const LOOK_MS = 3_000;

const FATES = {
  applied: "is applied",
  refused: "is refused again",
  due: "is tried as soon as its sink delivers",
  waiting: "still waits",
  discarded: "is discarded",
  unsettled: "cannot be discarded yet",
  unknown: "is not parked any more",
};

export class Parked {
  #toast;
  #allowed = true;
  #looked = -Infinity;
  #shown = "";
  #discarding = null;

  /** toast: says something to the person at the screen. */
  constructor(toast) {
    this.#toast = toast;
    byId("parked-retry").addEventListener("click", () => this.#act("retry", { ids: null }));
    byId("discard-cancel").addEventListener("click", () => byId("discard-dialog").close());
    byId("discard-form").addEventListener("submit", (event) => this.#discard(event));
  }

  /** Look what there is, now and then, while the status tells of any. */
  async update(status) {
    const count = Object.values(status.sinks).reduce((sum, sink) => sum + sink.parked, 0);
    if (!this.#allowed || count === 0) {
      byId("parked-section").hidden = true;
      return;
    }
    if (performance.now() - this.#looked > LOOK_MS) await this.#look(count);
  }

  async #look(count) {
    this.#looked = performance.now();
    try {
      const { letters } = await ask(`/api/dead-letters?limit=${SHOWN}`);
      byId("parked-section").hidden = letters.length === 0;
      const rest = count > letters.length ? ` The first ${letters.length} are shown: cdc dead-letters list has all.` : "";
      setText(byId("parked-count"), `${plural(count, "change", "changes")}.${rest}`);
      this.#draw(letters);
    } catch (error) {
      if (error.status === 403) this.#allowed = false; // it is for admins
    }
  }

  /** Rows are made anew only where something is: somebody may be on one of them with the keyboard. */
  #draw(letters) {
    const text = JSON.stringify(letters.map(({ nextAttemptAt, ...letter }) => letter));
    if (text === this.#shown) return;
    this.#shown = text;
    byId("parked-rows").replaceChildren(...letters.map((letter) => this.#row(letter)));
  }

  #row(letter) {
    const { id, state, behind, tables, operation, key, attempts, error, parkedAt } = letter;
    const retry = () => this.#act("retry", { ids: [id] });
    const discard = () => this.#askForReason(id);
    const age = duration((Date.now() - Date.parse(parkedAt)) / 1000);
    return element(
      "tr",
      { "data-id": id },
      element("td", { class: "time", title: `since ${clock(parkedAt)}, for ${age}` }, id),
      element("td", {}, badge(state, attempts)),
      element("td", { class: "entity" }, `${operation} ${tables.join(", ")}`),
      element("td", {}, element("code", {}, key === null ? "" : JSON.stringify(key))),
      element("td", { class: "wide" }, behind === null ? error : `behind ${behind}`),
      element(
        "td",
        { class: "actions" },
        element("button", { type: "button", onclick: retry, disabled: state === "waiting" }, "Retry"),
        element("button", { type: "button", onclick: discard }, "Discard"),
      ),
    );
  }

  #askForReason(id) {
    this.#discarding = id;
    setText(byId("discard-title"), `Discard ${id}?`);
    byId("discard-reason").value = "";
    byId("discard-dialog").showModal();
  }

  #discard(event) {
    event.preventDefault();
    const reason = byId("discard-reason").value.trim();
    if (reason === "") return;
    byId("discard-dialog").close();
    this.#act("discard", { ids: [this.#discarding], reason });
  }

  async #act(action, wish) {
    const options = { method: "POST", body: JSON.stringify(wish) };
    try {
      const { outcomes } = await ask(`/api/dead-letters/${action}`, options);
      this.#looked = -Infinity;
      if (outcomes.length === 1) this.#toast(`${outcomes[0].id} ${FATES[outcomes[0].fate]}`);
      else this.#toast(said(outcomes));
    } catch (error) {
      this.#toast(error.status === 403 ? "This token does not allow that" : error.message);
    }
  }
}

/** `3 applied, 1 refused`. */
function said(outcomes) {
  if (outcomes.length === 0) return "Nothing is left to try";
  const counts = new Map();
  for (const { fate } of outcomes) counts.set(fate, (counts.get(fate) ?? 0) + 1);
  return [...counts].map(([fate, count]) => `${count} ${fate}`).join(", ");
}

function badge(state, attempts) {
  const tone = { dead: "deleted", retrying: "updated", waiting: "event" }[state];
  const title = attempts > 0 ? `tried ${plural(attempts, "time", "times")}` : false;
  return element("span", { class: `badge ${tone}`, title }, state);
}
