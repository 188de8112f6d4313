/** Building elements, and saying numbers. All text becomes text nodes: nothing here can turn data into HTML. */

const SVG = "http://www.w3.org/2000/svg";

/** `element("p", {class: "note", onclick: f, hidden: false}, "text", child)`. */
export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function drawing(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node[name] = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Only touches the page where something is new: it is read aloud, and selected by people. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const precise = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export const count = (number) => (number < 100_000 ? plain.format(number) : compact.format(number));

export function rate(perSecond) {
  if (perSecond === null || perSecond === undefined) return "–";
  return perSecond > 0 && perSecond < 10 ? precise.format(perSecond) : count(perSecond);
}

export function bytes(number) {
  if (number === null || number === undefined) return "–";
  const units = ["B", "KB", "MB", "GB", "TB"];
  const power = number < 1 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(number) / 3));
  return `${precise.format(number / 1000 ** power)} ${units[power]}`;
}

/** `0.4 s`, `12 s`, `3 min`, `5 h`, `2 d`. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.05) return "0 s";
  if (seconds < 10) return `${precise.format(seconds)} s`;
  if (seconds < 120) return `${plain.format(seconds)} s`;
  if (seconds < 7200) return `${plain.format(seconds / 60)} min`;
  if (seconds < 172_800) return `${plain.format(seconds / 3600)} h`;
  return `${plain.format(seconds / 86_400)} d`;
}

export function clock(iso) {
  return new Date(iso).toLocaleTimeString([], { hour12: false, hour: "2-digit", minute: "2-digit", second: "2-digit" });
}

export const plural = (number, one, many) => `${count(number)} ${number === 1 ? one : many}`;
