/** Requests of the page, with the token that the tab knows. */

import { bearer, request } from "./cdc-common.js";
import { byId } from "./page-dom.js";

const KEY = "cdc-token";

export const httpUrl = location.origin;

export const token = () => sessionStorage.getItem(KEY) ?? undefined;

/** JSON from the server, or an Error with `status`. */
export async function ask(path, options = {}) {
  const headers = await bearer(token);
  return request(`${httpUrl}${path}`, { ...options, headers, cache: "no-store", signal: AbortSignal.timeout(15_000) });
}

/** Ask the person at the screen for a token, once however many ask; resolves when there is one. */
let asking = null;
export function askForToken(why = "") {
  asking ??= new Promise((resolve) => {
    const dialog = byId("token-dialog");
    byId("token-refusal").textContent = token() ? why : "";
    byId("token").value = "";
    dialog.addEventListener("cancel", (event) => event.preventDefault(), { once: true });
    byId("token-form").addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        dialog.close();
        sessionStorage.setItem(KEY, byId("token").value.trim());
        asking = null;
        resolve();
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}
