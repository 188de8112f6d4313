/** Types of cdc-client.js. The promises of each method stand in docs/javascript-client.md. */

export type ChangeType = "CREATE" | "UPDATE" | "DELETE" | "EVENT";

/** A decimal number of any length. Opaque: give it back, do not count with it. */
export type Cursor = string;

/** A token, or what gives one for each connection (a JWT that has to be renewed, say). */
export type Token = string | (() => string | undefined | Promise<string | undefined>);

export interface RealtimeEvent<T = any> {
  channel: string;
  /** `created`, `updated`, `deleted`, or the name that it was published under. */
  event: string;
  /** Of the entity; `*` means all of that type. */
  id: string;
  /** After the change; of a deleted entity what was last known, or null. */
  data: T | null;
  cursor: Cursor;
  entityType: string;
  changeType: ChangeType;
  version: number;
  changedAt: string;
  locationId: string | null;
  userId: string | null;
  changed: string[] | null;
}

export interface Change<T = any> {
  id: number;
  entityType: string;
  entityId: string;
  changeType: ChangeType;
  channel: string;
  locationId: string | null;
  userId: string | null;
  changedAt: string;
  recordedAt: string;
  source: string;
  position: string;
  version: number;
  before: T | null;
  after: T | null;
  changed: string[] | null;
  delta: unknown;
  event?: string;
  lookup?: true;
  truncated?: true;
}

export interface ClientOptions {
  /** Default: `/ws` of `httpUrl`, or of the server that the page came from. */
  wsUrl?: string | URL;
  /** Default: the server of `wsUrl`, or that the page came from. */
  httpUrl?: string;
  token?: Token;
  /** Keep cursors in localStorage under this key, so that a reload goes on where the page was left. */
  storageKey?: string;
  storage?: Storage;
  minDelayMs?: number;
  maxDelayMs?: number;
  connectTimeoutMs?: number;
  stableMs?: number;
  pingMs?: number;
  pongTimeoutMs?: number;
  /** Failed connections in a row before changes are polled. `Infinity`: never. */
  pollAfter?: number;
  retrySocketMs?: number;
  pollWaitSeconds?: number;
  maxPendingFrames?: number;
}

export interface GapInfo {
  channel: string;
  since: Cursor;
  oldest: Cursor | null;
  cursor: Cursor;
}

type Remove = () => void;

export class RealtimeClient {
  constructor(options?: ClientOptions);
  readonly transport: "websocket" | "polling" | null;
  readonly cursors: Record<string, Cursor | null>;
  connect(): Promise<void>;
  disconnect(): void;
  isConnected(): boolean;
  subscribe(channels: string[], options?: { since?: Cursor | Record<string, Cursor> }): Promise<Record<string, Cursor>>;
  unsubscribe(channels: string[]): void;
  on<T = any>(pattern: string, listener: (event: RealtimeEvent<T>) => unknown): Remove;
  off<T = any>(pattern: string, listener: (event: RealtimeEvent<T>) => unknown): void;
  onConnect(listener: (info: { transport: "websocket" | "polling" }) => unknown): Remove;
  onDisconnect(listener: (info: { reason: string }) => unknown): Remove;
  onGap(listener: (gap: GapInfo) => unknown): Remove;
  onError(listener: (error: Error) => unknown): Remove;
}

/** The server does not let us: 401 or 403. */
export class Refused extends Error {
  readonly status: 401 | 403;
  readonly hint: string;
}

/** Changes behind `since` are not kept any more, or it is of another feed. `cursor` goes on with what is left. */
export class Gap extends Error {
  readonly since: string;
  readonly oldest: Cursor | null;
  readonly cursor: Cursor;
}

export interface PollRequest {
  httpUrl: string;
  token?: Token;
  /** A cursor, an ISO 8601 time, or `now`; left out: from the oldest change that is kept. */
  since?: string;
  entityTypes?: string[];
  channels?: string[];
  locationId?: string;
  limit?: number;
  /** Seconds. */
  wait?: number;
  signal?: AbortSignal;
}

/** One request to `GET /api/changes/poll`. Throws `Gap` and `Refused`. */
export function fetchChanges<T = any>(
  request: PollRequest,
): Promise<{ changes: Change<T>[]; cursor: Cursor; hasMore: boolean; timestamp: string }>;

export interface NewOperation {
  resource: string;
  action?: string;
  /** Default: POST. */
  method?: string;
  data?: unknown;
  /** Default: `baseUrl/resource`. */
  url?: string;
}

export interface Operation extends NewOperation {
  /** Also the `Idempotency-Key`. */
  id: string;
  url: string;
  method: string;
  queuedAt: string;
  status: "pending" | "failed";
  httpStatus?: number;
  error?: string;
}

export interface QueueOptions {
  baseUrl?: string;
  key?: string;
  token?: Token;
  headers?: Record<string, string>;
  maxOperations?: number;
  maxBytes?: number;
  requestTimeoutMs?: number;
  minDelayMs?: number;
  maxDelayMs?: number;
  storage?: Storage;
  /** Keep other tabs out by a lease in localStorage, also where there are Web Locks. */
  lease?: boolean;
}

export interface QueueStats {
  pending: number;
  failed: number;
  oldestAt: string | null;
  isSyncing: boolean;
  nextTryAt: Date | null;
}

export class OfflineQueue {
  constructor(options?: QueueOptions);
  queueOperation(operation: NewOperation): Operation;
  getQueue(): Operation[];
  getStats(): QueueStats;
  syncAll(): Promise<{ sent: number; failed: number; pending: number }>;
  clearFailed(): void;
  retryFailed(): void;
  remove(id: string): void;
  onChange(listener: (stats: QueueStats) => unknown): Remove;
  onSent(listener: (sent: { operation: Operation; response: Response }) => unknown): Remove;
  onFailed(listener: (operation: Operation) => unknown): Remove;
  onError(listener: (error: Error) => unknown): Remove;
  close(): void;
}

/** There is no room for another operation; none was taken. */
export class QueueFull extends Error {}
