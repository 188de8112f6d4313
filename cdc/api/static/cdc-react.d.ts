/** Types of cdc-react.js. */

import type { Change, Cursor, Gap, Token } from "./cdc-client.js";

export interface SyncOptions<T = any> {
  entityTypes?: string[];
  /** Milliseconds; default 5000. */
  pollInterval?: number;
  onChanges?: (changes: Change<T>[]) => unknown;
  onGap?: (gap: Gap) => unknown;
  httpUrl?: string;
  token?: Token;
  locationId?: string;
  /** A cursor, an ISO 8601 time, or `now` (the default). */
  since?: string;
  enabled?: boolean;
}

export interface SyncState {
  /** The last request was answered. */
  isConnected: boolean;
  /** A request is under way. */
  isPolling: boolean;
  lastSync: Date | null;
  error: Error | null;
  cursor: Cursor | null;
  syncNow: () => void;
}

export function useRealTimeSync<T = any>(options?: SyncOptions<T>): SyncState;

export function useEntityChanges<T = any>(
  entityType: string,
  entityId?: string | number | null,
  options?: Omit<SyncOptions<T>, "entityTypes"> & { limit?: number },
): SyncState & { changes: Change<T>[]; latest: Change<T> | null };
