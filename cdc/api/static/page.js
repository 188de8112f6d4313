/** The page of the daemon: looks at /status every second, and listens to the changes. */

import { RealtimeClient, fetchChanges } from "./cdc-client.js";
import { Changes } from "./page-changes.js";
import { Charts } from "./page-charts.js";
import { Detail } from "./page-detail.js";
import { byId, duration, plural, setText } from "./page-dom.js";
import { Flow } from "./page-flow.js";
import { drawNotes, notes } from "./page-notes.js";
import { Parked } from "./page-parked.js";
import { History } from "./page-rates.js";
import { ask, askForToken, httpUrl, token } from "./page-server.js";

const STATUS_MS = 1_000;
const HIDDEN_STATUS_MS = 5_000;
const EARLIER_CHANGES = 50;

const history = new History();
const flow = new Flow(byId("flow"), toggle);
const charts = new Charts({
  rates: byId("rate-chart"),
  rateLegend: byId("rate-legend"),
  lags: byId("lag-chart"),
  lagLegend: byId("lag-legend"),
});
const detail = new Detail();
const parked = new Parked((text) => toast(text));
const changes = new Changes((event) => detail.open(event));

/** Look at the daemon for as long as the page is open. */
async function watchStatus() {
  let listening = false;
  for (;;) {
    const goesOn = await look();
    if (goesOn && !listening) {
      listening = true;
      listen();
    }
    if (goesOn === "changes only") return;
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? HIDDEN_STATUS_MS : STATUS_MS));
  }
}

/** One look. Returns whether the server lets us in, and `"changes only"` where there is no more to see. */
async function look() {
  try {
    show(await ask("/status"));
    return true;
  } catch (error) {
    if (error.status === 401) {
      await askForToken("That is not a token of this service.");
      return look();
    }
    if (error.status === 404 || error.status === 403) {
      health("calm", error.status === 404 ? "A gateway: it shows the changes only" : "This token shows changes only");
      return "changes only";
    }
    health("bad", error.status ? `The daemon answers ${error.status}` : "The daemon does not answer");
    return false;
  }
}

function show(status) {
  const pipelines = [...Object.entries(status.sources), ...Object.entries(status.sinks)];
  history.add(Date.now() / 1000, pipelines);
  byId("flow-section").hidden = byId("charts-section").hidden = false;
  flow.update(status, history);
  charts.update(history);
  drawNotes(byId("notes"), notes(status));
  parked.update(status);
  setText(byId("version"), status.version);
  setText(byId("uptime"), status.started_at ? `up ${duration(Date.now() / 1000 - status.started_at)}` : "");
  if (status.healthy) health("good", status.ready ? "All is well" : "Starting");
  else health("bad", plural(status.problems.length, "problem", "problems"));
}

function health(tone, text) {
  byId("health").dataset.tone = tone;
  setText(byId("health-text"), text);
  const title = `${tone === "bad" ? "⚠ " : ""}cdc: ${text.toLowerCase()}`;
  if (document.title !== title) document.title = title;
}

async function toggle(name, pause) {
  try {
    await ask(`/${pause ? "pause" : "resume"}/${encodeURIComponent(name)}`, { method: "POST" });
    toast(pause ? `${name} is paused` : `${name} goes on`);
  } catch (error) {
    toast(error.status === 403 ? "This token does not allow that" : error.message);
  }
}

let toastTimer;
function toast(text) {
  clearTimeout(toastTimer);
  setText(byId("toast"), text);
  byId("toast").classList.add("shown");
  toastTimer = setTimeout(() => byId("toast").classList.remove("shown"), 4_000);
}

/** Follow the feed, from a few changes ago. */
async function listen() {
  const client = new RealtimeClient({ httpUrl, token });
  client.on("*", (event) => changes.add(event));
  client.onConnect(({ transport }) => live("good", transport === "polling" ? "live, by polling" : "live"));
  client.onDisconnect(() => live("bad", "reconnecting …"));
  client.onError((error) => console.warn(error));
  const since = await earlier();
  if (since === null) return;
  client.subscribe(["*"], { since });
  client.connect();
}

/** The cursor of some changes ago; `null` where the daemon keeps no feed. */
async function earlier() {
  for (;;) {
    try {
      const { cursor } = await fetchChanges({ httpUrl, token, since: "now", limit: 1 });
      return String(Math.max(0, Number(cursor) - EARLIER_CHANGES)); // ours is the feed: we know what cursors are
    } catch (error) {
      if (error.status === 404) {
        live("calm", "no feed");
        setText(byId("empty"), "This daemon keeps no feed. With a sink data_changes its changes show here.");
        return null;
      }
      live("bad", "reconnecting …");
      await new Promise((resolve) => setTimeout(resolve, 2_000));
    }
  }
}

function live(tone, text) {
  byId("live").dataset.tone = tone;
  setText(byId("live-text"), text);
}

watchStatus();
