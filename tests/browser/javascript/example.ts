/** Every part of the interface, as an application in TypeScript uses it: this has to compile. */

import { Gap, OfflineQueue, QueueFull, RealtimeClient, Refused, fetchChanges } from "../../../cdc/api/static/cdc-client.js";
import { useEntityChanges, useRealTimeSync } from "../../../cdc/api/static/cdc-react.js";

interface Order {
  id: number;
  status: "open" | "paid";
}

async function realtime(): Promise<string | null> {
  const client = new RealtimeClient({ wsUrl: "wss://cdc.example.com/ws", token: async () => "jwt", storageKey: "orders" });
  const remove = client.on<Order>("orders:updated", (event) => {
    const status: "open" | "paid" | undefined = event.data?.status;
    console.log(status, event.cursor, event.changed?.length);
  });
  client.onConnect(({ transport }) => console.log(transport));
  client.onDisconnect(({ reason }) => console.log(reason));
  client.onGap(async ({ channel, cursor }) => console.log(channel, cursor));
  client.onError((error) => error instanceof Refused && console.log(error.status, error.hint));
  const cursors = await client.subscribe(["orders"], { since: { orders: "17" } });
  await client.connect();
  remove();
  client.unsubscribe(["orders"]);
  client.disconnect();
  return client.isConnected() ? client.transport : (cursors["orders"] ?? null);
}

async function poll(): Promise<number> {
  try {
    const { changes, cursor, hasMore } = await fetchChanges<Order>({ httpUrl: "https://cdc.example.com", since: "now" });
    return changes.filter((change) => change.changeType === "DELETE" && change.before?.status === "open").length;
  } catch (error) {
    if (error instanceof Gap) return Number(error.cursor);
    throw error;
  }
}

async function offline(): Promise<number> {
  const queue = new OfflineQueue({ baseUrl: "/api", token: "token" });
  queue.onFailed((operation) => console.log(operation.httpStatus, operation.error));
  try {
    queue.queueOperation({ resource: "orders", action: "create", method: "POST", data: { total: 5 } });
  } catch (error) {
    if (!(error instanceof QueueFull)) throw error;
  }
  queue.clearFailed();
  const { sent } = await queue.syncAll();
  return sent + queue.getStats().pending + queue.getQueue().length;
}

function Component(): string {
  const { isConnected, lastSync, error, syncNow } = useRealTimeSync<Order>({
    entityTypes: ["Order"],
    pollInterval: 5000,
    onChanges: (changes) => console.log(changes[0]?.after?.status),
  });
  const { latest } = useEntityChanges<Order>("Order", 17);
  syncNow();
  return `${isConnected} ${lastSync?.toISOString()} ${error?.message} ${latest?.after?.status}`;
}

// @ts-expect-error: a misspelt option is seen
new RealtimeClient({ wsUri: "wss://cdc.example.com/ws" });

export { Component, offline, poll, realtime };
