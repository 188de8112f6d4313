/** One change: what was before, what is after, and the entity's history. */

import { fetchChanges } from "./cdc-client.js";
import { badge } from "./page-changes.js";
import { byId, element, setText } from "./page-dom.js";
import { ask, httpUrl, token } from "./page-server.js";

const HISTORY = 20;

export class Detail {
  #dialog = byId("detail");
  #asked = 0;

  constructor() {
    byId("detail-close").addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("click", ({ target }) => target === this.#dialog && this.#dialog.close());
  }

  /** Open it for an event, at once with what that tells, and then with all that is kept of the entity. */
  async open(event) {
    const mine = ++this.#asked;
    setText(byId("detail-title"), `${event.entityType} ${event.id}`);
    byId("detail-body").replaceChildren(element("p", { class: "empty" }, "Looking it up …"));
    this.#dialog.showModal();
    try {
      const changes = await lookUp(event);
      if (mine !== this.#asked) return;
      if (changes.length > 0) this.#show(changes, changes[0]);
      else this.#say("This change is not kept any more.");
    } catch (error) {
      if (mine === this.#asked) this.#say(`The history cannot be read: ${error.message}`);
    }
  }

  #say(text) {
    byId("detail-body").replaceChildren(element("p", { class: "empty" }, text));
  }

  #show(changes, change) {
    const facts = {
      Changed: new Date(change.changedAt).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" }),
      By: change.userId,
      Where: change.locationId,
      Channel: change.channel,
      Source: change.source,
      Cursor: change.id,
      Position: change.position,
    };
    const rows = Object.entries(facts).filter(([, value]) => value !== null && value !== undefined);
    byId("detail-body").replaceChildren(
      element("p", { class: "lead" }, badge(change), element("span", {}, `version ${change.version}`)),
      element("dl", {}, ...rows.map(([name, value]) => fact(name, String(value)))),
      ...notes(change),
      images(change),
      element("h3", {}, "History"),
      element("ol", { class: "history" }, ...changes.map((other) => this.#version(changes, other, change))),
    );
  }

  #version(changes, other, shown) {
    const show = () => this.#show(changes, other);
    const attributes = { type: "button", onclick: show, "aria-current": other === shown ? "true" : false };
    const version = element("span", {}, `version ${other.version}`);
    const what = element("span", { class: "faint" }, other.changed?.join(", ") ?? "");
    return element("li", {}, element("button", attributes, badge(other), version, what));
  }
}

/** The change and those before it, the newest first; none where it is not kept any more. */
async function lookUp({ entityType, id, cursor }) {
  const path = [entityType, id].map(encodeURIComponent).join("/");
  const { changes } = await ask(`/api/changes/${path}?limit=${HISTORY}&before=${Number(cursor) + 1}`);
  if (String(changes[0]?.id) === cursor) return changes;
  // an entity type with a slash cannot be asked for by path
  const polled = await fetchChanges({ httpUrl, token, since: String(Number(cursor) - 1), limit: 1 });
  return polled.changes.filter((change) => String(change.id) === cursor);
}

function fact(name, value) {
  return element("div", { "data-fact": name }, element("dt", {}, name), element("dd", {}, value));
}

function notes(change) {
  const found = [];
  if (change.truncated) found.push("The images were larger than the limit, and left out.");
  if (change.lookup) found.push("“After” was looked up later, and may show what happened since.");
  return found.map((text) => element("p", { class: "note" }, text));
}

/** Field by field, before and after. */
function images({ before, after, changed, changeType }) {
  if (!isObject(before) && !isObject(after)) return element("p", { class: "empty" }, "Nothing is known of its fields.");
  const fields = [...new Set([...Object.keys(after ?? {}), ...Object.keys(before ?? {})])];
  const head = element("tr", {}, ...["Field", "Before", "After"].map((text) => element("th", { scope: "col" }, text)));
  const rows = fields.map((field) => {
    const differs = isObject(before) && isObject(after) && said(before[field]) !== said(after[field]);
    const isChanged = changeType === "UPDATE" && (changed?.includes(field) ?? differs);
    return element(
      "tr",
      { class: isChanged ? "changed" : "" },
      element("th", { scope: "row" }, field),
      element("td", {}, value(before, field)),
      element("td", {}, value(after, field)),
    );
  });
  const table = element("table", { class: "images" }, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", { class: "table-frame" }, table);
}

const isObject = (image) => typeof image === "object" && image !== null;

const said = (found) => (typeof found === "string" ? found : JSON.stringify(found, null, 1));

function value(image, field) {
  if (!isObject(image) || !(field in image)) return element("span", { class: "faint", "aria-label": "unknown" }, "·");
  return element("code", { class: image[field] === null ? "faint" : "" }, said(image[field]));
}
