/** A small application on the hooks; what it shows is what the tests look at. */

import { StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";
import { useEntityChanges, useRealTimeSync } from "../../../cdc/api/static/cdc-react.js";

window.batches = [];
window.gaps = [];

function Sync({ types }) {
  const state = useRealTimeSync({
    entityTypes: types,
    pollInterval: window.options.pollInterval,
    since: window.options.since,
    onChanges: async (changes) => {
      await window.options.onChanges?.(changes);
      window.batches.push(changes.map((change) => change.entityId));
    },
    onGap: (gap) => window.gaps.push(gap.cursor),
  });
  window.syncNow = state.syncNow;
  return (
    <p id="sync">
      {state.isConnected ? "connected" : "off"} {state.cursor} {state.error?.message} {state.lastSync ? "synced" : ""}
    </p>
  );
}

function Entity({ id }) {
  const { changes, latest, isConnected } = useEntityChanges("Orders", id, { pollInterval: window.options.pollInterval });
  return (
    <p id="entity" className={isConnected ? "connected" : "off"}>
      {changes.map((change) => `${change.entityId}.${change.version}`).join(" ")} latest {latest?.version}
    </p>
  );
}

function Application() {
  const [id, setId] = useState(undefined);
  const [types, setTypes] = useState(["Orders"]);
  const [isThere, setIsThere] = useState(true);
  Object.assign(window, { setId, setTypes, setIsThere });
  return (
    <>
      {isThere ? <Sync types={types} /> : <p id="gone" />}
      <Entity id={id} />
    </>
  );
}

window.begin = (options) => {
  window.options = options;
  document.body.replaceChildren(document.createElement("main"));
  createRoot(document.querySelector("main")).render(
    <StrictMode>
      <Application />
    </StrictMode>,
  );
};
